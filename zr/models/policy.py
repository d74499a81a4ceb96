"""The model that reasons: traces sampled from it, and the score distribution at the end of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zr.models.backbones.vlm import VLMBackbone
from zr.models.heads import ScoreTokenHead
from zr.models.prefix import Prefix

__all__ = ["Policy", "Rollouts", "SamplingRule"]


@dataclass(frozen=True)
class SamplingRule:
    """How traces are sampled; evaluation of their log-probs follows the same rule.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        length: most tokens of a trace, its end token included; a trace that has no end by then is closed by force.
        suppressed: ids never sampled, besides all control tokens but the end.
    """

    temperature: float = 1.0
    length: int = 1024
    suppressed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.length >= 1):
            raise ValueError(f"a sampling rule needs temperature >= 0 and length >= 1, got {self}")


@dataclass(frozen=True)
class Rollouts:
    """Traces and what was answered after them; M of them, those of one row contiguous.

    Args:
        row: ``(M,)`` row of the prefix.
        dimension: ``(M,)`` index of the rubric's dimension.
        tokens: ``(M, T)`` sampled ids, padded on the right.
        mask: ``(M, T)`` bool, True where a token was sampled; the end token counts when it was sampled.
        forced: ``(M,)`` bool, True where the length limit cut the trace and the end was appended.
        logits: ``(M, K)`` logits of the labels after trace, end and marker.
    """

    row: Tensor
    dimension: Tensor
    tokens: Tensor
    mask: Tensor
    forced: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.row)


class Policy(nn.Module):
    """A vision-language backbone under a reasoning wording.

    Args:
        backbone: its wording opens a trace, names the end token and the marker.
    """

    def __init__(self, backbone: VLMBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.rubric = backbone.rubric
        self.head = ScoreTokenHead(backbone)

    @torch.no_grad()
    def sample(
        self,
        prefix: Prefix,
        dimensions: Sequence[str],
        group_size: int,
        rule: SamplingRule,
        seeds: Sequence[int] | None = None,
    ) -> Rollouts:
        """Sample ``group_size`` traces per row and read the score distribution after each.

        Args:
            prefix: B rows.
            dimensions: B names, the dimension that each row is asked for.
            group_size: G, traces per row.
            rule: how to sample.
            seeds: B * G seeds, one for each rollout, so that a trace depends on its own seed and never on what else is in the
                batch; None draws them from torch's global generator.

        Returns:
            B * G rollouts, those of one row contiguous.

        Raises:
            ValueError: a number of dimensions that is not the number of rows, an unknown dimension, G below 1, a number of
                seeds that is not the number of rollouts.
        """
        if len(dimensions) != len(prefix) or group_size < 1:
            raise ValueError(
                f"{len(dimensions)} dimensions for {len(prefix)} rows, group size {group_size}: one each, and >= 1"
            )
        self.rubric.index(list(dict.fromkeys(dimensions)))  # names an unknown one
        rows = torch.arange(len(prefix)).repeat_interleave(group_size)
        if seeds is None:
            seeds = torch.randint(2**62, (len(rows),)).tolist()
        if len(seeds) != len(rows):
            raise ValueError(f"{len(seeds)} seeds for {len(rows)} rollouts: one each")
        luck = torch.stack([torch.rand(rule.length, dtype=torch.float64, generator=_generator(seed)) for seed in seeds])
        names = [dimensions[i] for i in rows.tolist()]
        index = torch.tensor([self.rubric.dimensions.index(name) for name in names])
        traces: list[list[int]] = [[] for _ in names]
        for dimension in sorted(set(index.tolist())):  # suffixes of one dimension have one length: no row steps through a pad
            members = (index == dimension).nonzero().flatten()
            sampled = self._sample_one(prefix.fork(rows[members]), self.rubric.dimensions[dimension], rule, luck[members])
            for member, trace in zip(members.tolist(), sampled, strict=True):
                traces[member] = trace
        return self._rollouts(prefix, rows, index, traces)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The traces as text, without control tokens."""
        tokens, mask = rollouts.tokens.tolist(), rollouts.mask.tolist()
        kept = [[t for t, m in zip(row, seen, strict=True) if m] for row, seen in zip(tokens, mask, strict=True)]
        return [self.backbone.prompts.decode(ids) for ids in kept]

    def _sample_one(self, prefix: Prefix, dimension: str, rule: SamplingRule, luck: Tensor) -> list[list[int]]:
        """Traces of M rows that ask for one dimension; ``luck (M, length)`` decides each token."""
        prompts = self.backbone.prompts
        traces: list[list[int]] = [[] for _ in range(len(prefix))]
        alive = list(range(len(prefix)))
        hidden, prefix = self.backbone.advance(prefix, [prompts.suffix_ids(dimension)] * len(prefix))
        for step in range(rule.length):
            token = self._next(hidden[:, -1], rule, luck[alive, step])
            for i, t in zip(alive, token.tolist(), strict=True):
                traces[i].append(t)
            going = (token != prompts.end_id).nonzero().flatten()
            if not len(going) or step + 1 == rule.length:
                break
            alive = [alive[i] for i in going.tolist()]
            hidden, prefix = self.backbone.advance(prefix.fork(going), token[going, None].tolist())
        return traces

    def _next(self, hidden: Tensor, rule: SamplingRule, luck: Tensor) -> Tensor:
        """The next tokens ``(M,)``: where the cumulative probability passes ``luck (M,)``, uniform in [0, 1)."""
        prompts = self.backbone.prompts
        logits: Tensor = self.backbone.output(hidden).float()
        logits[:, sorted((prompts.control_ids - {prompts.end_id}).union(rule.suppressed))] = -torch.inf
        if rule.temperature == 0:
            return logits.argmax(-1)
        cumulative = (logits / rule.temperature).cpu().double().softmax(-1).cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]  # rounding must not leave a gap at the end
        return torch.searchsorted(cumulative, luck[:, None], right=True).squeeze(-1).to(logits.device)

    def _rollouts(self, prefix: Prefix, rows: Tensor, index: Tensor, traces: list[list[int]]) -> Rollouts:
        """Read the score of each trace by a replay, with the end appended where it is missing, and the marker."""
        prompts = self.backbone.prompts
        forced = [trace[-1] != prompts.end_id for trace in traces]
        suffixes = [
            [*prompts.suffix_ids(self.rubric.dimensions[d]), *trace, *([prompts.end_id] if cut else []), *prompts.marker_ids]
            for d, trace, cut in zip(index.tolist(), traces, forced, strict=True)
        ]
        hidden = self.backbone.extend(prefix.fork(rows), suffixes)
        last = torch.tensor([len(s) - 1 for s in suffixes], device=hidden.device)
        at_score = hidden[torch.arange(len(suffixes), device=hidden.device), last]
        device = hidden.device
        lengths = torch.tensor([len(t) for t in traces], device=device)
        width = int(lengths.max())
        tokens = torch.tensor([[*t, *[prompts.end_id] * (width - len(t))] for t in traces], device=device)
        return Rollouts(
            row=rows.to(device),
            dimension=index.to(device),
            tokens=tokens,
            mask=torch.arange(width, device=device) < lengths[:, None],
            forced=torch.tensor(forced, device=device),
            logits=self.head(at_score[:, None], index[:1].to(device)).squeeze(1),
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
