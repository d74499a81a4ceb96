"""The model that reasons: traces sampled from it, their log-probs, and the score distribution at the end of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from zr.models.backbones.vlm import VLMBackbone
from zr.models.branches import CachedBranches, WholeBranches, branch
from zr.models.heads import ScoreTokenHead, outside
from zr.models.log_probs import token_log_probs
from zr.models.prefix import CachedPrefix, Prefix, join
from zr.models.prompts import PromptBuilder
from zr.models.sharding import Company
from zr.scores import ScoreDistribution

__all__ = ["Evaluation", "Policy", "PrefixSampler", "Questions", "Rollouts", "Sampler", "SamplingRule", "Written"]


@dataclass(frozen=True)
class SamplingRule:
    """How traces are sampled; evaluation of their log-probs follows the same rule.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        length: most tokens of a trace, its end token included; a trace that has no end by then is closed by force.
        suppressed: ids never sampled, besides all control tokens but the end and ids that stand for no text.
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
        log_probs: ``(M, T)`` log-probs of the tokens as the sampler drew them, zero elsewhere; all zero at temperature 0.
    """

    row: Tensor
    dimension: Tensor
    tokens: Tensor
    mask: Tensor
    forced: Tensor
    logits: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def select(self, index: Tensor | slice) -> Rollouts:
        """Some of the rollouts, as wide as before; their ``row`` is still that of the prefix they were sampled from."""
        return Rollouts(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True)
class Questions:
    """What the rollouts of each question share, computed once: the states of its image and of the start of its opening.

    It stands for the prefix where rollouts are evaluated in parts, and is cut as one (:mod:`zr.models.prefix`), so that an
    opening is differentiated once, however its rollouts are split.

    Args:
        prefix: a row for each question.
        place: the row of each question, which is a row of the images' prefix and the index of a dimension.
        shared: tokens of each opening that ``prefix`` includes.
    """

    prefix: Prefix
    place: dict[tuple[int, int], int]
    shared: int

    def cut(self) -> Questions:
        """The same on leaf copies, where backward passes end."""
        return replace(self, prefix=self.prefix.cut())

    def replay_loss(self) -> Tensor:
        """A scalar whose backward pass carries on what the leaves gathered."""
        return self.prefix.replay_loss()


@dataclass(frozen=True)
class Evaluation:
    """What the policy makes of M given rollouts.

    Args:
        log_probs: ``(M, T)`` log-probs of the sampled tokens under the rule, in nats, with gradients; zero elsewhere.
        entropy: ``(M, T)`` entropy of the rule's distribution at each sampled token, in nats, without gradient; zero elsewhere.
        scores: batch shape ``(M,)``, after trace, end and marker, with gradients.
        log_mass: ``(M,)`` log-probability of the labels together, where a score is due, in nats, with gradients; None where the
            policy was built without ``off_scale``.
    """

    log_probs: Tensor
    entropy: Tensor
    scores: ScoreDistribution
    log_mass: Tensor | None = None


@dataclass(frozen=True)
class Written:
    """What a sampler gives back, of M traces.

    Args:
        traces: 1 to ``rule.length`` ids each, which end with the wording's end token or at that length.
        log_probs: the log-prob of each id under the rule, in nats.
        at_score: ``(M, H)`` hidden states after trace, end and marker; None of a sampler that has none, so that the policy
            replays the traces.
    """

    traces: list[list[int]]
    log_probs: list[list[float]]
    at_score: Tensor | None = None


class Sampler(Protocol):
    """Whatever writes traces: :class:`PrefixSampler`, or an inference server that holds the same weights."""

    def __call__(
        self,
        backbone: VLMBackbone,
        prefix: Prefix,
        row: Sequence[int],
        openings: Sequence[Sequence[int]],
        rule: SamplingRule,
        forbidden: Tensor,
        seeds: Sequence[int],
    ) -> Written:
        """Write M traces.

        Args:
            backbone: the model.
            prefix: what the questions share.
            row: M rows of the prefix.
            openings: M lists of ids that stand between prefix and trace.
            rule: temperature and length.
            forbidden: ``(F,)`` ids never to be sampled.
            seeds: M seeds, one for each trace.
        """


class PrefixSampler:
    """Samples token by token from the states of the prefix; a row that has ended waits until all have.

    What a group shares, the opening included, is computed once. Openings of unequal lengths are read apart and their states
    joined, so that no row meets a pad, after which linear attention must not go on. End and marker are read in one pass.
    """

    @torch.no_grad()
    def __call__(
        self,
        backbone: VLMBackbone,
        prefix: Prefix,
        row: Sequence[int],
        openings: Sequence[Sequence[int]],
        rule: SamplingRule,
        forbidden: Tensor,
        seeds: Sequence[int],
    ) -> Written:
        """See :class:`Sampler`.

        Raises:
            ValueError: logits with NaN or infinity.
        """
        prompts = backbone.prompts
        traces: list[list[int]] = [[] for _ in row]
        log_probs: list[list[float]] = [[] for _ in row]
        luck = torch.stack([torch.rand(rule.length, dtype=torch.float64, generator=_generator(seed)) for seed in seeds])
        room = rule.length + 1 + len(prompts.marker_ids)  # a trace, the end that it may lack, the marker

        def idle() -> Tensor:
            return backbone.advance(prefix.fork(torch.tensor(row[:1])), [[prompts.end_id]])[0][:, -1]

        last, branches = self._open(backbone, prefix, row, openings, room, Company(backbone.model, idle))
        company = Company(backbone.model, lambda: backbone.logits(idle()))
        forbidden = forbidden.to(last.device)
        for step in range(rule.length):
            going = branches.going
            logits = backbone.logits(last).float().index_fill_(-1, forbidden, -torch.inf)
            broken = (~logits.amax(-1).isfinite()).nonzero().flatten().tolist()
            if broken:
                raise ValueError(
                    f"{len(broken)} of {len(going)} traces have NaN or infinite logits (first: row {row[going[broken[0]]]} "
                    f"of the prefix, token {step}): look at the inputs of that sample and at the weights for NaN"
                )
            token, log_prob = draw(logits, rule.temperature, luck[going, step])
            for i, t, p in zip(going, token.tolist(), log_prob.tolist(), strict=True):
                traces[i].append(t)
                log_probs[i].append(p)
            ended = ((token == prompts.end_id) | (step + 1 == rule.length)).nonzero().flatten().tolist()
            if ended:
                token = token[branches.leave(ended)]
                if not len(branches):
                    break
            company.step()
            last = backbone.grow(branches, token[:, None].tolist())[:, -1]
        company.wait()
        branches.gather()
        tails = [[traces[i][-1], *_closing(prompts, traces[i])] for i in branches.order]
        at_score = _at_last(backbone.grow(branches, tails), tails)
        return Written(traces, log_probs, at_score[torch.tensor(branches.order).argsort().to(at_score.device)])

    def _open(
        self,
        backbone: VLMBackbone,
        prefix: Prefix,
        row: Sequence[int],
        openings: Sequence[Sequence[int]],
        room: int,
        company: Company,
    ) -> tuple[Tensor, CachedBranches | WholeBranches]:
        """States ``(M, H)`` that tell the first tokens, and the branches that the traces are written on."""
        asked = [(r, tuple(opening)) for r, opening in zip(row, openings, strict=True)]
        questions = sorted(dict.fromkeys(asked), key=lambda question: len(question[1]))
        read = []
        for _, some in groupby(questions, key=lambda question: len(question[1])):
            rows, same = zip(*some, strict=True)
            company.step()
            hidden, states = backbone.advance(prefix.fork(torch.tensor(rows)), same)
            read.append((hidden[:, -1], states))
        company.wait()
        index = torch.tensor([questions.index(question) for question in asked])
        last = torch.cat([hidden for hidden, _ in read])
        return last[index.to(last.device)], branch(join([states for _, states in read]), index, room)


class Policy(nn.Module):
    """A vision-language backbone under a reasoning wording.

    Args:
        backbone: its wording opens a trace, names the end token and the marker.
        sampler: writes the traces.
        off_scale: scores of :meth:`evaluate` also hold the probability outside the labels.
    """

    def __init__(self, backbone: VLMBackbone, sampler: Sampler | None = None, off_scale: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.rubric = backbone.rubric
        self.head = ScoreTokenHead(backbone, off_scale)
        self.sampler: Sampler = sampler or PrefixSampler()
        text = set(backbone.processor.tokenizer.get_vocab().values()) - (
            backbone.prompts.control_ids - {backbone.prompts.end_id}
        )
        self._no_text = frozenset(range(self._vocabulary)) - text

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
                seeds that is not the number of rollouts, a suppressed id outside the vocabulary, more tokens than the model
                reads, NaN in the logits.
        """
        if len(dimensions) != len(prefix) or group_size < 1:
            raise ValueError(
                f"{len(dimensions)} dimensions for {len(prefix)} rows, group size {group_size}: one each, and >= 1"
            )
        self.rubric.index(list(dict.fromkeys(dimensions)))  # names an unknown one
        row = torch.arange(len(prefix)).repeat_interleave(group_size)
        if seeds is None:
            seeds = torch.randint(2**62, (len(row),)).tolist()
        if len(seeds) != len(row):
            raise ValueError(f"{len(seeds)} seeds for {len(row)} rollouts: one each")
        dimension = torch.tensor([self.rubric.dimensions.index(dimensions[i]) for i in row.tolist()])
        openings = [self.backbone.prompts.suffix_ids(self.rubric.dimensions[d]) for d in dimension.tolist()]
        forbidden = self._forbidden(rule)
        self._check_room(prefix, row.tolist(), row.tolist(), openings, [rule.length] * len(row))
        written = self.sampler(self.backbone, prefix, row.tolist(), openings, rule, forbidden, seeds)
        traces, at_score = written.traces, written.at_score
        if at_score is None:
            _, _, at_score = self._replay(prefix, row, dimension, traces)
        device = at_score.device
        lengths = torch.tensor([len(trace) for trace in traces], device=device)
        width, end = int(lengths.max()), self.backbone.prompts.end_id
        return Rollouts(
            row=row.to(device),
            dimension=dimension.to(device),
            tokens=torch.tensor([[*t, *[end] * (width - len(t))] for t in traces], device=device),
            mask=torch.arange(width, device=device) < lengths[:, None],
            forced=torch.tensor([trace[-1] != end for trace in traces], device=device),
            logits=self._labels(at_score),
            log_probs=torch.tensor([[*p, *[0.0] * (width - len(p))] for p in written.log_probs], device=device),
        )

    def ask(self, prefix: Prefix, rollouts: Rollouts) -> Questions:
        """Read once what the rollouts of a question share: all of its opening but the end, which tells the first token.

        The openings are cut at one length for all questions, since nothing may be appended after a pad, and for all batches,
        so that rounding stays the same. A prefix of whole sequences has nothing to share.

        Args:
            prefix: the rows that the rollouts were sampled from.
            rollouts: all that will be evaluated.

        Returns:
            What :meth:`evaluate` and :meth:`score` take in place of the prefix.

        Raises:
            ValueError: rows that the prefix does not have.
        """
        return self._ask(prefix, rollouts.row, rollouts.dimension)

    def evaluate(self, prefix: Prefix | Questions, rollouts: Rollouts, rule: SamplingRule) -> Evaluation:
        """Log-probs, entropy and score distributions of given rollouts, with gradients into model and prefix.

        One pass over all suffixes, from the states that the rollouts of a row share. Rollouts may be evaluated in parts, by
        :meth:`Rollouts.select` and a cut prefix (:mod:`zr.models.prefix`), or cut questions (:meth:`ask`), which share more.

        Args:
            prefix: the rows that the rollouts were sampled from, or what was asked of them.
            rollouts: M of them.
            rule: the one they were sampled by; at unchanged weights the log-probs are those of the sampler.

        Returns:
            Everything of the M rollouts, as wide as their ``tokens``.

        Raises:
            ValueError: temperature 0 (a greedy trace has probability one, and no gradient), a token that the rule suppresses,
                rows that the prefix does not have, more tokens than the model reads, NaN in the logits of the labels.
        """
        if rule.temperature == 0:
            raise ValueError("greedy traces have no log-probs to learn from: evaluate by a rule with temperature > 0")
        sampled, place = rollouts.mask.nonzero(as_tuple=True)
        tokens, forbidden = rollouts.tokens[rollouts.mask], self._forbidden(rule).to(rollouts.tokens.device)
        wrong = torch.isin(tokens, forbidden).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"rollout {int(sampled[wrong[0]])} holds the token {int(tokens[wrong[0]])}, which the rule suppresses: "
                "evaluate by the rule that the rollouts were sampled by"
            )
        hidden, start, at_score = self._replay(prefix, rollouts.row, rollouts.dimension, _traces(rollouts))
        before = hidden[sampled, start[sampled] + place - 1]
        found = token_log_probs(before, tokens, self.backbone.output, rule.temperature, forbidden)
        log_probs, entropy = (value.new_zeros(rollouts.mask.shape).index_put((sampled, place), value) for value in found)
        log_mass = self.head.log_mass(at_score)
        off_scale = None if log_mass is None else outside(log_mass)
        scores = ScoreDistribution(self._labels(at_score), self.rubric.bins, off_scale=off_scale)
        return Evaluation(log_probs, entropy, scores, log_mass)

    def score(self, prefix: Prefix | Questions, rollouts: Rollouts) -> ScoreDistribution:
        """Score distributions after given traces, whoever wrote them and for whichever image.

        Args:
            prefix: what is judged, or what was asked of it.
            rollouts: M of them; only rows, dimensions and traces count. A trace may be empty (nothing in its ``mask``).

        Returns:
            Batch shape ``(M,)``, with gradients.

        Raises:
            ValueError: rows that the prefix does not have, more tokens than the model reads.
        """
        _, _, at_score = self._replay(prefix, rollouts.row, rollouts.dimension, _traces(rollouts))
        return ScoreDistribution(self._labels(at_score), self.rubric.bins, off_scale=self.head.off_scale(at_score))

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The traces as text, without control tokens."""
        return [self.backbone.prompts.decode(trace) for trace in _traces(rollouts)]

    @property
    def _vocabulary(self) -> int:
        return int(self.backbone.model.config.get_text_config().vocab_size)

    def _forbidden(self, rule: SamplingRule) -> Tensor:
        """Ids that are never sampled: the rule's, and what is no text (control tokens but the end, rows of padding)."""
        outside = [i for i in rule.suppressed if not 0 <= i < self._vocabulary]
        if outside:
            raise ValueError(f"suppressed ids must be in [0, {self._vocabulary}), got {outside}")
        return torch.tensor(sorted(self._no_text.union(rule.suppressed)))

    def _check_room(
        self,
        prefix: Prefix,
        place: Sequence[int],
        row: Sequence[int],
        openings: Sequence[Sequence[int]],
        written: Sequence[int],
    ) -> None:
        """Refuse traces that with what stands around them are longer than the context; ``place`` is their row of the prefix."""
        prompts = self.backbone.prompts
        if prompts.length is None:
            return
        shared = prefix.mask.sum(-1).tolist() if isinstance(prefix, CachedPrefix) else list(map(len, prefix.ids))
        after = len(prompts.marker_ids) + 2  # the end, which may be appended, and the label
        for p, r, opening, count in zip(place, row, openings, written, strict=True):
            needed = shared[p] + len(opening) + count + after
            if needed > prompts.length:
                raise ValueError(
                    f"row {r}: system text, images, prompt and question have {shared[p] + len(opening)} tokens, with a trace "
                    f"of {count}, end and marker {needed}; the model reads {prompts.length}: sample by a rule of length "
                    f"{max(0, prompts.length - needed + count)} or less, or make the images or the prompt smaller"
                )

    def _ask(self, prefix: Prefix, row: Tensor, dimension: Tensor) -> Questions:
        """See :meth:`ask`."""
        _check_rows(prefix, row)
        names, prompts = self.rubric.dimensions, self.backbone.prompts
        shared = min(len(prompts.suffix_ids(name)) for name in names) - 1
        if not isinstance(prefix, CachedPrefix) or shared < 1:
            return _unshared(prefix, row, dimension)
        asked = list(dict.fromkeys(zip(row.tolist(), dimension.tolist(), strict=True)))
        images = prefix.fork(torch.tensor([r for r, _ in asked]))
        _, states = self.backbone.advance(images, [prompts.suffix_ids(names[d])[:shared] for _, d in asked])
        return Questions(states, {question: i for i, question in enumerate(asked)}, shared)

    def _replay(
        self, prefix: Prefix | Questions, row: Tensor, dimension: Tensor, traces: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states ``(M, S, H)``, where the traces start in them ``(M,)``, states at the score ``(M, H)``.

        Without a gradient, what the rollouts of a question share is computed once. With one it is only where the caller asked
        (:meth:`ask`): else micro-batches would differentiate a shared opening in as many parts as they are, and the gradient
        through linear attention would round by the split.
        """
        prompts = self.backbone.prompts
        if isinstance(prefix, Questions):
            questions = prefix
        elif torch.is_grad_enabled():
            _check_rows(prefix, row)
            questions = _unshared(prefix, row, dimension)
        else:
            questions = self._ask(prefix, row, dimension)
        asked = list(zip(row.tolist(), dimension.tolist(), strict=True))
        unknown = [question for question in asked if question not in questions.place]
        if unknown:
            r, d = unknown[0]
            name = self.rubric.dimensions[d]
            raise ValueError(f"nobody asked row {r} for {name}: ask all questions of the rollouts that will be evaluated")
        place = [questions.place[question] for question in asked]
        openings = [prompts.suffix_ids(self.rubric.dimensions[d])[questions.shared :] for d in dimension.tolist()]
        self._check_room(questions.prefix, place, row.tolist(), openings, list(map(len, traces)))
        suffixes = [[*opening, *trace, *_closing(prompts, trace)] for opening, trace in zip(openings, traces, strict=True)]
        hidden = self.backbone.extend(questions.prefix.fork(torch.tensor(place)), suffixes)
        start = torch.tensor([len(opening) for opening in openings], device=hidden.device)
        return hidden, start, _at_last(hidden, suffixes)

    def _labels(self, at_score: Tensor) -> Tensor:
        """``(M, K)`` logits of the labels; the head is the same for all dimensions."""
        logits: Tensor = self.head(at_score[:, None], torch.zeros(1, dtype=torch.long, device=at_score.device))
        return logits.squeeze(1)


BLOCK = 128
"""Tokens whose probabilities are added on the device before the running sum is taken."""


def draw(logits: Tensor, temperature: float, luck: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens at which the running sum of probabilities passes ``luck``.

    The running sums are taken in float64, where rounding loses no token however large the vocabulary; what touches the whole
    vocabulary happens on the logits' device, in float32.

    Args:
        logits: ``(M, V)`` float32; ``-inf`` is never drawn.
        temperature: divides them; 0 takes the most probable token.
        luck: ``(M,)`` float64 in [0, 1), on the CPU.

    Returns:
        ``(M,)`` ids and their ``(M,)`` log-probs in nats, both on the CPU; log-probs are zero at temperature 0.

    Example:
        >>> logits = torch.tensor([[0.2, 0.0, 0.8]]).log().expand(3, -1)
        >>> tokens, log_probs = draw(logits, 1.0, torch.tensor([0.19, 0.21, 0.99], dtype=torch.float64))
        >>> tokens.tolist(), [round(p, 4) for p in log_probs.exp().tolist()]
        ([0, 2, 2], [0.2, 0.8, 0.8])
    """
    if temperature == 0:
        return logits.argmax(-1).cpu(), torch.zeros(len(logits), dtype=torch.float64)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    blocks = nn.functional.pad(scaled.exp(), (0, -logits.shape[-1] % BLOCK)).reshape(len(logits), -1, BLOCK)
    sums = blocks.sum(-1).cpu().double()
    total = sums.sum(-1)
    block, left = _first_above(sums, luck * total)
    rows = torch.arange(len(logits))
    inner, _ = _first_above(blocks[rows, block].cpu().double(), left)
    token = block * BLOCK + inner
    return token, scaled[rows, token].cpu().double() - total.log()


def _first_above(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of ``weights (M, n)`` passes ``target (M,)``, and what of the target is left there."""
    running = weights.cumsum(-1)
    target = target.minimum(running[:, -1].nextafter(torch.zeros(())))  # rounding must not leave the last positive weight
    index = torch.searchsorted(running, target[:, None], right=True)
    before = (running - weights).gather(-1, index)
    return index.squeeze(-1), (target - before.squeeze(-1)).clamp_min(0)


def _check_rows(prefix: Prefix, row: Tensor) -> None:
    """Refuse rollouts of another prefix."""
    if not int(row.max()) < len(prefix):
        raise ValueError(f"rollouts of row {int(row.max())} for a prefix of {len(prefix)} rows: give the prefix they came from")


def _unshared(prefix: Prefix, row: Tensor, dimension: Tensor) -> Questions:
    """Questions whose openings are read with each trace."""
    return Questions(prefix, {(r, d): r for r, d in zip(row.tolist(), dimension.tolist(), strict=True)}, 0)


def _closing(prompts: PromptBuilder, trace: Sequence[int]) -> list[int]:
    """What stands between a trace and its score."""
    return [*([] if trace[-1:] == [prompts.end_id] else [prompts.end_id]), *prompts.marker_ids]


def _at_last(hidden: Tensor, suffixes: Sequence[Sequence[int]]) -> Tensor:
    """``(M, H)`` states of the last token of each suffix."""
    last = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=hidden.device)
    return hidden[torch.arange(len(suffixes), device=hidden.device), last]


def _traces(rollouts: Rollouts) -> list[list[int]]:
    tokens, mask = rollouts.tokens.tolist(), rollouts.mask.tolist()
    return [[t for t, m in zip(row, seen, strict=True) if m] for row, seen in zip(tokens, mask, strict=True)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
