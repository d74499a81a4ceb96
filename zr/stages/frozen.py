"""A teacher beside a stage: it goes where the stage goes, and is no part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from zr.models import RewardModel, Scorer

__all__ = ["FrozenTeacher"]


class FrozenTeacher(nn.Module):
    """Stages that ask a teacher while they train; to be named before the stage among the bases.

    The call that moves the stage to a device moves its teacher too. Otherwise the stage does not know of it: it is neither in
    the checkpoint nor among the parameters, and stays in evaluation mode. Each process holds a whole one.
    """

    _beside: tuple[Any, ...] = ()  # in a tuple: no part of this module

    @property
    def teacher(self) -> Any:
        """What is asked, or None."""
        return self._beside[0] if self._beside else None

    def put_beside(self, teacher: Scorer | None, model: RewardModel) -> None:
        """Take a teacher for ``model``.

        Raises:
            ValueError: a teacher of another scale, or one that shares weights with the model.
        """
        if teacher is None:
            return
        if teacher.rubric.scale_id != model.rubric.scale_id:
            raise ValueError(
                f"student and teacher need one scale: {list(model.rubric.dimensions)} on {model.rubric.bins}, and "
                f"{list(teacher.rubric.dimensions)} on {teacher.rubric.bins}"
            )
        if isinstance(teacher, nn.Module):
            own = {id(parameter) for parameter in model.parameters()}
            if any(id(parameter) in own for parameter in teacher.parameters()):
                raise ValueError("student and teacher share weights, so the teacher would learn too: load it a second time")
            teacher.eval()
        self._beside = (teacher,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the stage, called by ``to`` and its kin."""
        if isinstance(self.teacher, nn.Module):
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
