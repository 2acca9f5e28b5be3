"""What every recipe has around its loop: the directory of its run, and the files of the program that started it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from fwasync.recipes.config import RecipeConfig
from fwasync.recipes.runner import Runner
from fwasync.tracking.run import Run, open_run

__all__ = ("recording",)


@asynccontextmanager
async def recording(config: RecipeConfig, run: Run | None) -> AsyncGenerator[tuple[Run, Runner]]:
    """The run that is given, or else one in `config.log_path`, opened for the time of the block; and its runner.

    Raises:
        RunDirectoryError: The directory cannot be used.
    """
    async with AsyncExitStack() as stack:
        if run is None:
            settings = config.model_dump()
            run = await stack.enter_async_context(
                open_run(config.log_path, config=settings, wandb=config.wandb, resume=True)
            )
        runner = await stack.enter_async_context(Runner(config.runner, accelerators=config.infra.accelerator_count))
        await runner.pending()
        yield run, runner
