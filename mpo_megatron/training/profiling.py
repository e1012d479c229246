"""Where the time of a step goes, for a window of steps on some ranks: `model.profile` and `model.nsys_profile`.

Outside of the window nothing is measured and nothing of Megatron is told.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.utils import configure_nvtx_profiling, get_model_config
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from mpo_megatron.config import Config, ProfileConfig
from mpo_megatron.errors import ConfigError
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.training.report import say

if TYPE_CHECKING:
    from mpo_megatron.training.job import Job

# From a name to a range of the timeline.
Mark = Callable[[str], AbstractContextManager[Any]]


def chosen(config: Config) -> ProfileConfig | None:
    """The window that is asked for; `config` allows one of the two."""
    asked = [window for window in (config.model.profile, config.model.nsys_profile) if window.enabled]
    return asked[0] if asked else None


def check_profile(config: Config, layout: ParallelLayout, total_steps: int) -> None:
    """Check the window against the run.

    Raises:
        ConfigError: steps or ranks that the run does not have, or Nsight Systems without a GPU.
    """
    window = chosen(config)
    if window is None:
        return
    name = "model.profile" if config.model.profile.enabled else "model.nsys_profile"
    if window.end_step > total_steps:
        raise ConfigError(
            f"{name}.end_step={window.end_step} is after the last of the run's {total_steps} steps; lower it, and "
            f"{name}.start_step={window.start_step} with it"
        )
    if max(window.ranks) >= layout.world_size:
        raise ConfigError(
            f"{name}.ranks={list(window.ranks)} are numbers from 0 to {layout.world_size - 1}, of the run's ranks; "
            "leave the others out"
        )
    if config.model.nsys_profile.enabled and layout.device.type != "cuda":
        raise ConfigError(
            "model.nsys_profile.enabled=true is for Nsight Systems, on a GPU; take model.profile, which works on a CPU "
            "too, or run on a GPU"
        )


class ProfileWindow:
    """Profiles the steps of a run that its configuration says, on this rank if it is one of theirs.

    with ProfileWindow(job) as window:
        with window.step(1):
            ...
    """

    def __init__(self, job: "Job") -> None:
        self._job = job
        self._open = ExitStack()
        self._is_open = False
        self._settings = chosen(job.setup.config)

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around optimizer step `number`, from 1."""
        settings, layout = self._settings, self._job.setup.layout
        if settings is None or not settings.start_step <= number <= settings.end_step:
            yield
            return
        if layout.rank in settings.ranks and not self._is_open:
            self._is_open = True
            self._begin(settings)
        with self._job.mark(f"step {number}"):
            yield
        if number == settings.end_step:
            self._open.close()
            if layout.is_main and self._job.setup.config.model.profile.enabled:
                say(f"profile     of ranks {', '.join(map(str, settings.ranks))} in {self._folder}")

    @property
    def _folder(self) -> Path:
        return self._job.folder / "profile"

    def _begin(self, settings: ProfileConfig) -> None:
        job, layout = self._job, self._job.setup.layout
        if job.setup.config.model.profile.enabled:
            name = f"rank{layout.rank}_steps{settings.start_step}-{settings.end_step}.json.gz"
            mark = self._open.enter_context(
                torch_trace(self._folder / name, layout.device, settings.gen_shape)
            )
        else:
            mark = self._open.enter_context(nsight_capture(settings.gen_shape))
        self._open.enter_context(marked(job, mark))


@contextmanager
def torch_trace(path: Path, device: torch.device, shapes: bool) -> Iterator[Mark]:
    """Trace the block with torch's profiler, in all threads, into a file that ui.perfetto.dev opens."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, record_shapes=shapes, experimental_config=everywhere) as found:
        yield record_function
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))


@contextmanager
def nsight_capture(shapes: bool) -> Iterator[Mark]:
    """Have Nsight Systems record the block (nsys profile --capture-range=cudaProfilerApi), with Megatron's ranges.

    Not run by a test, which would need a GPU.
    """
    # Has no types.
    runtime: Any = torch.cuda.cudart()
    runtime.cudaProfilerStart()
    configure_nvtx_profiling(True)
    try:
        with torch.autograd.profiler.emit_nvtx(record_shapes=True) if shapes else nullcontext():
            yield torch.cuda.nvtx.range
    finally:
        configure_nvtx_profiling(False)
        runtime.cudaProfilerStop()


@contextmanager
def marked(job: "Job", mark: Mark) -> Iterator[None]:
    """Have the job's parts and Megatron's name what they do in the block: rows, forward, backward, sums, optimizer."""
    parts: list[Any] = [
        job,
        job.setup.train.source,
        *([job.setup.validation.source] if job.setup.validation else []),
    ]
    told = [get_model_config(chunk) for chunk in job.chunks]
    told += [part.config for part in getattr(job.optimizer, "chained_optimizers", [job.optimizer])]
    timers = RangeTimers(mark)
    for part in parts:
        part.mark = mark
    for config in told:
        config.timers = timers
    try:
        yield
    finally:
        for part in parts:
            part.mark = nullcontext
        for config in told:
            config.timers = None


class RangeTimers:
    """What Megatron calls its timers, which it starts and stops by name around what it does: here ranges."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._timers: dict[str, _RangeTimer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_RangeTimer":
        return self._timers.setdefault(name, _RangeTimer(name, self._mark))


class _RangeTimer:
    """One timer of Megatron's, started and stopped in turn."""

    def __init__(self, name: str, mark: Mark) -> None:
        self._name, self._mark = name, mark
        self._range: AbstractContextManager[Any] = nullcontext()

    def start(self, barrier: bool = False) -> None:
        """`barrier` would have all ranks wait for each other, which others than the profiled ones know nothing of."""
        self._range = self._mark(self._name)
        self._range.__enter__()

    def stop(self, barrier: bool = False) -> None:
        self._range.__exit__(None, None, None)
