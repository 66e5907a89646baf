"""What the operators share: the ``torch.library``, and which kernel serves a call.

The choice is made at run time, inside the operator, so it holds in compiled code as well.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastxkd._ranges import ranged

# torch comes first: its OpenMP runtime must be the one that the extension finds in the process.


def _extension(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"fastxkd.{name}")
    except ImportError:
        return None


_cpu = _extension("_cpu")
_cuda = _extension("_cuda")

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
OPERATORS = ("kd_loss", "cam", "distance", "principal", "concepts")
ON_GPU = ("kd_loss", "cam", "distance", "concepts")  # have CUDA and Triton kernels
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

library = torch.library.Library("fastxkd", "DEF")
Kernel = TypeVar("Kernel", bound=Callable[..., object])
ONCE = "fastxkd: the gradient comes in closed form and is differentiable once"


class _Choice(NamedTuple):
    backend: str
    level: str | None


def _choice(backend: str, level: str | None) -> _Choice:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if level is None:
        return _Choice(backend, None)
    if backend not in ("cpu", "auto"):
        raise ValueError(f"isa: only the 'cpu' backend has ISA levels, got backend {backend!r}")
    if level not in isa_levels():
        raise ValueError(
            f"isa: this build and processor run {', '.join(isa_levels()) or 'none'}, got {level!r}"
        )
    return _Choice(backend, level)


def isa_levels() -> tuple[str, ...]:
    """ISA levels of the C++ kernels that this processor can run, lowest first."""
    return () if _cpu is None else tuple(_cpu.LEVELS[: _cpu.best_level() + 1])


_forced: ContextVar[_Choice | None] = ContextVar("fastxkd_backend", default=None)


def _read_environment() -> _Choice:
    backend, level = (os.environ.get(f"FASTXKD_{name}") for name in ("BACKEND", "ISA"))
    try:
        return _choice(backend or "auto", level or None)
    except ValueError as error:
        raise ValueError(f"FASTXKD_BACKEND={backend!r}, FASTXKD_ISA={level!r}: {error}") from None


_from_environment = _read_environment()


def current_choice() -> _Choice:
    return _forced.get() or _from_environment


@contextmanager
def use_backend(name: str, *, isa: str | None = None) -> Iterator[None]:
    """Run the operators on one backend within a ``with`` block (this thread or task only).

    Args:
        name: ``"auto"`` (the fastest that is there), ``"cpu"`` (C++), ``"cuda"``, ``"triton"`` or
            ``"reference"`` (plain torch, any device).
        isa: for ``"cpu"``: ``"baseline"``, ``"avx2"`` or ``"avx512"`` instead of the best level.

    The environment variables ``FASTXKD_BACKEND`` and ``FASTXKD_ISA`` set the default of a process.

    Raises:
        ValueError: an unknown name, or an ISA level that this machine does not run.
        RuntimeError: at the call of an operator for which the forced backend has no kernel.

    >>> import torch, fastxkd
    >>> with fastxkd.use_backend("reference"):
    ...     loss = fastxkd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2]))
    >>> round(loss.item(), 4)
    0.1099
    """
    with using(_choice(name, isa)):
        yield


def chosen() -> _Choice | None:
    """What a ``use_backend`` around this call asked for; :func:`using` asks for it again."""
    return _forced.get()


@contextmanager
def using(choice: _Choice | None) -> Iterator[None]:
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def _interpreting() -> bool:
    """Triton runs kernels in its interpreter, on CPU tensors; asked of the environment, since
    importing Triton costs a third of a second."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has(kernel: str, operator: str, device: str, dtype: torch.dtype) -> str | None:
    """None when a kernel can serve such a call, else what is in the way."""
    if dtype not in DTYPES:
        return f"its kernels do not take {dtype}"
    if kernel == "cpu":
        if device != "cpu":
            return f"the C++ kernels do not run on {device} tensors"
        return "the C++ extension is not built" if _cpu is None else None
    if operator not in ON_GPU:
        return f"{operator} has no {kernel} kernel in this version"
    if kernel == "cuda":
        if device != "cuda":
            return f"the CUDA kernels do not run on {device} tensors"
        if _cuda is None:
            return "the CUDA extension is not built"
        problem = _cuda.problem()
        return None if problem is None else f"the CUDA extension found no device: {problem}"
    if device != "cuda" and not _interpreting():
        return f"the Triton kernels do not run on {device} tensors"
    return None if find_spec("triton") else "triton is not installed: pip install fastxkd[triton]"


def _serve(operator: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The kernel that serves a call under the current choice, and why."""
    forced = current_choice().backend
    if forced == "reference":
        return "reference", "asked for"
    if forced != "auto":
        missing = _has(forced, operator, device, dtype)
        if missing:
            raise RuntimeError(f"use_backend({forced!r}): cannot serve {operator}: {missing}")
        return forced, "asked for"
    order = ("cuda", "triton") if device == "cuda" else ("cpu",)
    missing = ""
    for kernel in order:
        missing = _has(kernel, operator, device, dtype) or ""
        if not missing:
            level = current_choice().level or (isa_levels()[-1] if kernel == "cpu" else "")
            return kernel, f"C++, {level}" if kernel == "cpu" else kernel
    if device == "cpu" and _cpu is None:
        missing = "the C++ extension is not built: installed without a compiler"
    return "reference", missing


def serve(operator: str, tensor: Tensor) -> str:
    choice = _forced.get() or _from_environment
    # The common case first and without words: this runs on every call.
    if (
        choice.backend in ("auto", "cpu")
        and _cpu is not None
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES
    ):
        return "cpu"
    return _serve(operator, tensor.device.type, tensor.dtype)[0]


def kernels() -> tuple[ModuleType, int, int]:
    """The C++ module, the index of the ISA level to run and the number of threads."""
    assert _cpu is not None
    level = current_choice().level
    index = _cpu.best_level() if level is None else _cpu.LEVELS.index(level)
    return _cpu, index, torch.get_num_threads()


def cuda_kernels(tensor: Tensor) -> tuple[ModuleType, int, int]:
    """The CUDA module, the tensor's device and that device's current stream."""
    assert _cuda is not None
    return _cuda, tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


_tickets: dict[tuple[int, int], Tensor] = {}


def ticket(tensor: Tensor) -> Tensor:
    """A counter by which the last block of a launch finds itself; that block sets it back to 0.

    A stream runs one launch after the other, so they can share one. A CUDA graph may be replayed
    beside others and gets its own.
    """
    if tensor.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=tensor.device)
    key = (tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=tensor.device)
    return _tickets[key]


def kernel_of(backend: str, operator: str, name: str = "") -> Callable[..., Any]:
    """A kernel that is a Python function: ``reference/`` or ``_triton/``, imported when asked."""
    folder = "reference" if backend == "reference" else "_triton"
    module = importlib.import_module(f"fastxkd.{folder}.{operator}")
    return getattr(module, name or operator)  # type: ignore[no-any-return]


def exact_dtype(*features: Tensor) -> torch.dtype:
    """What sums are taken in: float64 if a feature is float64, else float32."""
    wide = any(f.dtype == torch.float64 for f in features)
    return torch.float64 if wide else torch.float32


def unobserved(tensor: Tensor) -> bool:
    """Nothing looks on: no compiler, no tracer, no transform, no tensor subclass.

    Then a kernel may be called as the function it is. The dispatcher's round trip costs 5 us for a
    functional operator and 15 us for one that writes in place: as much as a small batch's loss.
    """
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def transformed() -> bool:
    """Within ``torch.func``: a tensor may then hide that a gradient is due to it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def wants_gradient(tensor: Tensor) -> bool:
    return (tensor.requires_grad and torch.is_grad_enabled()) or transformed()


def wants_function(tensor: Tensor) -> bool:
    """An autograd function must stand in the way of an operator: for its gradient or, in
    forward-mode differentiation, to say that there is no formula. The bare operator would give 0.
    """
    return forward_ad._current_level >= 0 or wants_gradient(tensor)


def differentiable_once(backward: Kernel) -> Kernel:
    """``once_differentiable``, also where the gradient from above is a constant and under
    ``torch.func``.

    torch's own puts the error in the way only if that gradient requires grad; that of a loss, a
    one, does not, and a gradient penalty would silently vanish. Nested ``torch.func.grad`` would
    give a silent zero: there the result is tied to all that ``backward`` saved, so an output that
    is the gradient must not be marked as non-differentiable.
    """
    inner = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def guarded(ctx: Any, *upstream: Any) -> Any:
        if transformed():
            with torch.no_grad():
                found = backward(ctx, *upstream)
            return _tied(found, (*upstream, *ctx.saved_tensors))
        found = inner(ctx, *upstream)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        grads = found if isinstance(found, tuple) else (found,)
        refused = tuple(
            _refuse(g) if isinstance(g, Tensor) and not g.requires_grad else g for g in grads
        )
        return refused if isinstance(found, tuple) else refused[0]

    return cast(Kernel, guarded)


def _tied(found: Any, causes: Sequence[Any]) -> Any:
    """``found``, gradients, as results of ``causes`` whose derivative is an error."""
    grads = [g for g in (found if isinstance(found, tuple) else (found,)) if g is not None]
    if not grads:
        return found
    causes = [c for c in causes if isinstance(c, Tensor) and c.is_floating_point()]
    tied = iter(_Once.apply(len(grads), *grads, *causes))
    if not isinstance(found, tuple):
        return next(tied)
    return tuple(None if g is None else next(tied) for g in found)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ONCE)


def _refuse(grad: Tensor) -> Tensor:
    refused: Tensor = torch._C._functions.DelayedError(ONCE.encode(), 1)(
        grad.detach().requires_grad_()
    )
    return refused


def cuda_extension() -> str:
    """What became of the CUDA extension on this machine, in words."""
    if _cuda is None:
        return "not built (no nvcc at installation, or FASTXKD_CUDA=0)"
    runtime, driver = _cuda.versions()
    versions = f"CUDA runtime {runtime // 1000}.{runtime % 1000 // 10}, driver " + (
        f"{driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    )
    found = f"{_cuda.device_count()} devices" if _cuda.problem() is None else _cuda.problem()
    built = ", ".join(f"sm_{arch}" for arch in _cuda.ARCHITECTURES.split(";"))
    return f"built for {built}, holds {', '.join(ON_GPU)}; {versions}; {found}"


class Backend(NamedTuple):
    """A row of :func:`backends`."""

    operator: str
    device: str
    kernel: str
    reason: str


def backends() -> list[Backend]:
    """Which kernel serves each operator on each device of this machine, and why.

    >>> import fastxkd
    >>> sorted({row.operator for row in fastxkd.backends()})
    ['cam', 'concepts', 'distance', 'kd_loss', 'principal']
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for operator in OPERATORS:
        for device in devices:
            try:
                kernel, reason = _serve(operator, device, torch.float32)
            except RuntimeError as error:
                kernel, reason = "none", str(error)
            rows.append(Backend(operator, device, kernel, reason))
    return rows


def define(schema: str, fake: Callable[..., object]) -> Callable[[Kernel], Kernel]:
    """Decorator: register a function as ``fastxkd::<schema>`` for every device."""

    def register(kernel: Kernel) -> Kernel:
        name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, ranged(name)(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastxkd::{name}", fake, lib=library)
        return kernel

    return register
