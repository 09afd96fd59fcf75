"""A progress bar for training, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["training_progress"]


@contextmanager
def training_progress(title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Shows steps, loss and the time left while the body runs.

    Args:
        title: What is being trained.
        steps: Number of steps.

    Yields:
        What to call after each step: `on_step(steps_done, loss)`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    smooth = float("nan")
    with progress:
        task = progress.add_task(title, total=steps, loss=smooth)

        def on_step(done: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if smooth != smooth else 0.95 * smooth + 0.05 * loss
            if done % 10 == 0 or done == steps:
                progress.update(task, completed=done, loss=smooth)

        yield on_step
