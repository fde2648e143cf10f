"""Choice of the implementation of a primitive.

A primitive declares its forms where it is written (`@primitive("reference", "sequential")`) and takes `implementation=`. The
default, "auto", lets a choice for the whole run decide (`with implementation("attention=reference"):`), and without one the
primitive's own policy, which goes by platform and shape. The form never changes what is computed, so it is an option of a
run and not a hyperparameter of a mixer. A choice is obeyed or refused, and never passed over.
"""

import contextlib
import contextvars
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

import ops
from common.errors import UserError, near
from ops.kept import keep


class _Declared(NamedTuple):
    """What a primitive has declared: its forms, the one of them that is made of matrix products, and those that are kernels for
    TPUs."""

    forms: tuple[str, ...]
    matmul: str | None
    tpu: tuple[str, ...]


# Decides where a primitive is called with "auto": (primitive, the forms that it offers, its policy) -> form.
_Decision = Callable[[str, Sequence[str], str], str]

# Logical names of an array's axes.
Axes = tuple[str | None, ...]

_declared: dict[str, _Declared] = {}
_run_wide: contextvars.ContextVar[_Decision | None] = contextvars.ContextVar("implementation", default=None)
_localise: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("localise", default=None)
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def primitive(
    *forms: str, matmul: str | None = None, tpu: tuple[str, ...] = (), kept: bool = True, tokens: bool = True
) -> Callable[[Callable], Callable]:
    """Declares the forms of the decorated function, whose name is that of the primitive.

    Args:
      *forms: names of its implementations, "reference" among them.
      matmul: the form that is made of matrix products, if one is; see `matmul_form`.
      tpu: further forms, which are kernels for TPUs and interpreted elsewhere.
      kept: whether what it returns is worth being kept (`ops.kept`).
      tokens: whether its arrays are of sequences [batch, length, ...]: a ValueError is then raised for a batch of no rows and for
        rows of no tokens, which the forms do not treat alike.
    """

    def declare(function: Callable) -> Callable:
        name = function.__name__
        _declared[name] = _Declared((*forms, *tpu), matmul, tpu)

        @functools.wraps(function)
        def marked(*arguments, **options):
            shapes = [a.shape for a in jax.tree.leaves(arguments) if getattr(a, "ndim", 0) > 2] if tokens else []
            if empty := [shape for shape in shapes if 0 in shape[:2]]:
                raise ValueError(
                    f"{name} takes arrays of [batch >= 1, length >= 1, ...], got {empty[0]}: drop what is empty"
                )
            found = function(*arguments, **options)
            return keep(found) if kept else found

        return marked

    return declare


def offered(platform: str | None = None) -> dict[str, tuple[str, ...]]:
    """The forms that each primitive of `ops` offers; without those that a platform, where one is given, would interpret."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"ops.{module.name}")
    interpreted = lambda declared: () if platform in (None, "tpu") else declared.tpu
    return {
        name: tuple(form for form in declared.forms if form not in interpreted(declared))
        for name, declared in sorted(_declared.items())
    }


class Choice:
    """The choice for a run: a form for each of some primitives, or one for all.

    Args:
      text: as of `implementation`.

    Attributes:
      asked: the primitives that were called with "auto" while the choice was in force, and the forms that each of them offered
        at all of its calls.
      taken: the forms that they were given.

    Raises:
      UserError: as `check` does.
    """

    def __init__(self, text: str):
        self._everywhere, self._of = _parse(text)
        self.asked: dict[str, tuple[str, ...]] = {}
        self.taken: dict[str, set[str]] = {}

    def form(self, primitive: str, forms: Sequence[str], policy: str) -> str:
        """The form that a primitive is to use.

        Raises:
          UserError: if it does not offer the chosen one.
        """
        self.asked[primitive] = tuple(form for form in self.asked.get(primitive, forms) if form in forms)
        wanted = self._of.get(primitive, self._everywhere)
        if wanted is None:
            wanted = policy
        elif wanted not in forms:
            able = ", ".join(
                f"{name}={wanted}" for name, declared in sorted(_declared.items()) if wanted in declared.forms
            )
            raise UserError(
                f"implementation: {primitive} has no form {wanted!r} in this model, it offers {', '.join(forms)}; "
                f"choose for single primitives (there is {able})"
            )
        self.taken.setdefault(primitive, set()).add(wanted)
        return wanted

    def check_used(self) -> None:
        """Raises a UserError if some of the choice had no effect on what was called while it was in force."""
        unused = [primitive for primitive in self._of if primitive not in self.asked]
        uses = f"it uses {', '.join(sorted(self.asked))}" if self.asked else "none of its primitives has a choice"
        if unused:
            raise UserError(f"implementation: the model does not use {', '.join(unused)}; {uses}")
        if self._everywhere is not None and not self.asked:
            raise UserError(
                f"implementation={self._everywhere!r} has no effect on this model: {uses}; leave it at 'auto'"
            )


def check(text: str) -> None:
    """Checks the text of a choice, see `implementation`.

    Raises:
      UserError: for a primitive or a form that does not exist; the message says what there is.
    """
    _parse(text)


@contextlib.contextmanager
def implementation(text: str) -> Iterator[Choice]:
    """Chooses the implementation of every primitive that is called with "auto" while tracing inside.

    What was traced before keeps its form, because it is not traced again.

    Args:
      text: "auto", by which every primitive follows its policy; or forms of some primitives, as in
        "linear_recurrence=associative,attention=reference"; or one form, as in "reference", for all primitives. A primitive
        without this form then raises a UserError when it is called ("reference" is offered by all).

    Yields:
      the `Choice`, which knows afterwards what has been asked for, see `Choice.check_used`.

    Raises:
      UserError: as `check` does.
    """
    choice = Choice(text)
    with _decided_by(choice.form):
        yield choice


@contextlib.contextmanager
def matmul_form() -> Iterator[None]:
    """Makes every primitive that is traced inside use its matmul form, where it has one: for counting operations."""

    def decide(primitive: str, forms: Sequence[str], policy: str) -> str:
        return _declared[primitive].matmul or policy

    with _decided_by(decide):
        yield


@contextlib.contextmanager
def _decided_by(decide: _Decision) -> Iterator[None]:
    token = _run_wide.set(decide)
    try:
        yield
    finally:
        _run_wide.reset(token)


def choose(primitive: str, requested: str, policy: str, offered: Sequence[str] | None = None) -> str:
    """Returns the form to use.

    Args:
      primitive: its name.
      requested: the caller's `implementation=` argument, "auto" or one of `offered`.
      policy: what "auto" means for these shapes on this platform.
      offered: the forms that can compute this call, where these are not all that the primitive has declared.

    Raises:
      ValueError: if `requested` is not offered.
      UserError: if the choice for the run is not offered.
    """
    offered = _declared[primitive].forms if offered is None else tuple(offered)
    if requested == "auto":
        decide = _run_wide.get()
        return policy if decide is None else decide(primitive, offered, policy)
    if requested not in offered:
        raise ValueError(f"implementation={requested!r} is not offered here; choose 'auto' or one of {offered}")
    return requested


def _parse(text: str) -> tuple[str | None, dict[str, str]]:
    """The form of all primitives, if there is one, and the forms of single primitives."""
    if text == "auto":
        return None, {}
    known = offered()
    if "=" not in text and "," not in text:
        forms = dict.fromkeys(form for forms in known.values() for form in forms)
        if text in known:
            raise UserError(
                f"implementation={text!r} is a primitive: say {text}=FORM; it offers {', '.join(known[text])}"
            )
        if text not in forms:
            offers = "; ".join(f"{primitive} offers {', '.join(forms)}" for primitive, forms in known.items())
            raise UserError(f"implementation={text!r} is unknown; {near(text, ('auto', *forms))}\n{offers}")
        return text, {}
    chosen: dict[str, str] = {}
    for entry in text.split(","):
        primitive, sign, form = (part.strip() for part in entry.partition("="))
        if not sign:
            raise UserError(
                f"implementation={text!r}: {entry!r} should be PRIMITIVE=FORM; the primitives are {', '.join(known)}"
            )
        if primitive not in known:
            raise UserError(f"implementation={text!r}: there is no primitive {primitive!r}; {near(primitive, known)}")
        if form not in known[primitive]:
            offers = f"it offers {', '.join(known[primitive])}"
            raise UserError(f"implementation={text!r}: {primitive} has no form {form!r}; {offers}")
        if primitive in chosen:
            raise UserError(f"implementation={text!r} chooses twice for {primitive}")
        chosen[primitive] = form
    return None, chosen


@contextlib.contextmanager
def platform(name: str) -> Iterator[None]:
    """Says what is traced inside is to run on: who traces for a mesh says the platform of its devices, which need not be here.

    Backward passes are traced after the forward pass, so whoever differentiates says it around the whole.

    Args:
      name: of a device (`jax.Device.platform`): "cpu", "tpu", or "gpu", for which "cuda" and "rocm" stand, too.
    """
    token = _platform.set("gpu" if name in ("cuda", "rocm") else name)
    try:
        yield
    finally:
        _platform.reset(token)


@contextlib.contextmanager
def localised_by(
    localise: Callable[[Callable, Sequence[Axes], Axes | Sequence[Axes], bool], Callable],
) -> Iterator[None]:
    """Makes `local` call `localise` while tracing inside; who traces for a mesh knows which axes it splits."""
    token = _localise.set(localise)
    try:
        yield
    finally:
        _localise.reset(token)


def local(function: Callable, inputs: Sequence[Axes], output: Axes | Sequence[Axes], kernel: bool = False) -> Callable:
    """A function that each device applies to its own part of the arguments: for what the compiler would not split itself.

    Args:
      function: of trees of arrays to a tree of them; what it computes must not cross an axis that is named.
      inputs: logical names of the first axes of all arrays of each argument ("batch", "heads", ...), None for one that every
        device has whole.
      output: likewise, of the result; or, if that is a tuple, a tuple of axes for each of its entries.
      kernel: whether the function calls a kernel. A result of it that is not split by an axis by which arguments are split is
        summed over the devices. Who differentiates it must see to it that devices whose output is the same compute the same.

    Returns:
      the function itself where nothing is split.
    """
    localise = _localise.get()
    return function if localise is None else localise(function, inputs, output, kernel)


def current_platform() -> str:
    """The platform that is traced for, "cpu", "tpu" or "gpu": what `platform` says, else JAX's default."""
    return _platform.get() or jax.default_backend()


def on_cpu() -> bool:
    """Whether what is traced is to run on a CPU."""
    return current_platform() == "cpu"


def matmul_precision(dtype) -> jax.lax.Precision:
    """Full precision for float32 (and wider) operands, the platform's fast path for bfloat16."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else jax.lax.Precision.DEFAULT
