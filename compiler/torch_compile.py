"""`torch.compile(model, backend="convloom")`: graphs that TorchDynamo traces, as executables.

    fast = torch.compile(model, backend="convloom", options={"target": "interpreter"})
    with torch.no_grad():
        y = fast(x)
    print(convloom.executables()[-1].explain())

TorchDynamo flattens arguments and results, splits at graph breaks, and calls the backend once per
graph with the weights as inputs. Here they become constants again, under their own names, and the
graph is replayed inside a module that `capture` exports, so that its nodes keep their module paths.
Each call looks whether a weight has changed, and compiles again if so, unless `check_weights` is
False. What no version counter sees (writing through `weight.data`) takes `torch.compiler.reset()`.

What an executable cannot be runs as torch ops, with a warning that says why: results that need
gradients, graphs that write their inputs or return views of them, and what capture refuses. Sizes
that vary: where it is the batch alone, an executable takes a range of them; else each combination
has its own executable, as many as TorchDynamo would compile a function for.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import nn
from torch._guards import tracing
from torch.amp import autocast_mode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InvalidInputError, UnsupportedOpError, near_names
from .api import executable_for
from .capture.example_inputs import check_example
from .capture.refusals import module_in_words
from .graph.torch_call import TorchCall
from .run.executable import Executable

DEFAULTS: dict[str, Any] = {
    "target": "cuda",
    "dtype": None,
    "precision": "ieee",
    "tuning": "records",
    "passes": "default",
    "fallback": "torch",
    "force": (),
    "forbid": (),
    "check_weights": True,
}
"""The options, as `convloom.compile` takes them, and whether each call looks at the weights."""
LARGEST_WHOLE_RANGE = 1024
"""A range of batches up to this one is compiled at once; of a longer one as much as is needed."""
KINDS = (WEIGHT, INPUT, SIZE, NUMBER) = ("weight", "input", "size", "number")
"""What a graph takes: tensors of modules, tensors of the caller, symbolic sizes, and Python's
floating-point numbers, which TorchDynamo passes as tensors."""

_VERSION = attrgetter("_version")

_made: list[weakref.ref[Executable]] = []


def executables() -> list[Executable]:
    """What `torch.compile(backend="convloom")` has compiled in this process and still uses, oldest
    first: one executable per graph, and per range of sizes."""
    living = [executable for ref in _made if (executable := ref()) is not None]
    _made[:] = map(weakref.ref, living)
    return living


def backend(
    module: GraphModule,
    examples: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend of the entry point `torch_dynamo_backends`: a graph as a callable.

    options: `target`, `dtype`, `precision`, `tuning`, `passes`, `fallback`, `force` and `forbid` of
    `convloom.compile`; `fallback` is "torch" unless it says "error". With `check_weights` False the
    caller promises that weights do not change.

    Raises: InvalidInputError for unknown options or any mode; what `convloom.compile` raises, but
    CaptureError and UnsupportedOpError only under fallback="error".
    """
    if mode is not None:
        raise InvalidInputError(f"mode: backend 'convloom' has none, got {mode!r}; pass options")
    for name in options or ():
        if name not in DEFAULTS:
            raise InvalidInputError(
                f"options: backend 'convloom' has no {name!r}; {near_names(name, DEFAULTS)}"
            )
    return CompiledGraph(module, examples, {**DEFAULTS, **(options or {})})


class CompiledGraph:
    """One graph of TorchDynamo: its executables, or the graph itself where it cannot have one."""

    def __init__(
        self, module: GraphModule, examples: Sequence[Any], options: dict[str, Any]
    ) -> None:
        self._module, self._options = module, options
        self._checks = options.pop("check_weights")
        self._lock = threading.RLock()
        sources = _sources(module)
        held = [node for node in sources if node.op == "get_attr"]
        self._held = [attrgetter(str(node.target))(module) for node in held]
        self._kinds = [_kind(source) for source in sources]
        self._is_weight = [kind == WEIGHT for kind in self._kinds]
        self._inputs = [at for at, kind in enumerate(self._kinds) if kind == INPUT]
        self._batches = _batches(sources, self._kinds)
        self._varies = any(map(_is_symbolic, sources)) or NUMBER in self._kinds
        self._name = _name_of(module)
        self._untangled, self._paths = _untangled(module)
        self._executables: dict[Any, Executable] = {}
        self._weights: list[torch.Tensor] = []
        self._state: tuple[list[int], list[int]] | None = None
        self._told: set[str] = set()
        self._eager = False
        # A symbol's value without a guard on it.
        examples = [x.node.hint if isinstance(x, torch.SymInt) else x for x in examples]
        examples += self._held
        if reason := _why_not(module, self._kinds, examples):
            self._give_up(CaptureError(reason))
        else:
            self._find(examples)

    def __call__(self, *arguments: Any) -> Any:
        """The graph's results, as a tuple."""
        given = (*arguments, *self._held) if self._held else arguments
        executable = None if self._eager else self._find(given)
        if executable is None:
            return self._module(*arguments)
        return executable(*[arguments[at] for at in self._inputs])

    def _find(self, arguments: Sequence[Any]) -> Executable | None:
        """The executable for a call, compiled now if need be; None where torch has to run it."""
        key = self._key(arguments) if self._varies else None
        executable = self._executables.get(key)
        if executable is not None and not self._checks:
            return executable
        weights = list(compress(arguments, self._is_weight))
        state = list(map(torch.Tensor.data_ptr, weights)), list(map(_VERSION, weights))
        if executable is not None and state == self._state:
            return executable
        with self._lock:
            if state != self._state:
                self._executables.clear()
                # They are held, so that no other tensor can have their addresses.
                self._weights, self._state = weights, state
            if key not in self._executables and not self._eager:
                key = self._add(key, arguments)
            return self._executables.get(key)

    def _key(self, arguments: Sequence[Any]) -> Any:
        """What tells executables apart: sizes and numbers, or the largest batch of a range."""
        given = list(zip(self._kinds, arguments, strict=True))
        numbers = tuple(x.item() for kind, x in given if kind == NUMBER)
        if self._batches is None:
            return tuple(getattr(x, "shape", x) for k, x in given if k in (INPUT, SIZE)), numbers
        _, highest = self._batches
        batch = arguments[self._inputs[0]].shape[0]
        # The next power of two where the range has no end, or one far away.
        return highest or max(2, 1 << (batch - 1).bit_length()), numbers

    def _add(self, key: Any, arguments: Sequence[Any]) -> Any:
        """Compiles for a key, or finds that torch must run the graph; returns the key."""
        bounds = None if self._batches is None else (self._batches[0], key[0])
        try:
            self._executables[key] = self._compiled(arguments, bounds)
        except (CaptureError, UnsupportedOpError) as error:
            if bounds is not None:  # Perhaps each batch by itself.
                self._batches = None
                return self._add(self._key(arguments), arguments)
            self._give_up(error)
        return key

    def _compiled(self, arguments: Sequence[Any], bounds: tuple[int, int] | None) -> Executable:
        limit = torch._dynamo.config.recompile_limit
        if len(self._executables) >= limit:
            raise CaptureError(
                f"its sizes vary, and it is compiled for {limit} of them already (torch._dynamo."
                "config.recompile_limit); only the batch, dimension 0 of all inputs, is a range"
            )
        inputs = tuple(arguments[at] for at in self._inputs)
        try:
            check_example(inputs, bounds is not None)
        except InvalidInputError as error:
            raise CaptureError(str(error)) from error
        replay = self._replay(arguments, bounds is not None)
        # Neither TorchDynamo's own tracing nor the caller's mode is that of the export.
        with tracing(None), torch.inference_mode(False), torch.no_grad():
            executable = executable_for(replay, inputs, dynamic_batch=bounds, **self._options)
        self._tell(executable)
        _made.append(weakref.ref(executable))
        return executable

    def _replay(self, arguments: Sequence[Any], is_range: bool) -> _Replay:
        """The graph as a module; sizes are those of the call, or follow the batch of its input."""
        replay: _Replay = type(self._name, (_Replay,), {})(self._untangled)
        count = 0
        for path, kind, argument in zip(self._paths, self._kinds, arguments, strict=True):
            if kind == WEIGHT:
                replay.hold(path, argument)
            elif kind == INPUT:
                replay.values.append(itemgetter(count))
                count += 1
            elif kind == SIZE and is_range:
                replay.values.append(lambda inputs: inputs[0].shape[0])
            else:
                value = _Number(argument.item()) if kind == NUMBER else argument
                replay.values.append(partial(lambda value, _: value, value))
        return replay

    def _give_up(self, error: Exception) -> None:
        """From here on torch runs the graph."""
        if self._options["fallback"] == "error":
            raise error
        self._eager = True
        warnings.warn(f"convloom: {self._name} runs as torch ops: {error}", stacklevel=2)

    def _tell(self, executable: Executable) -> None:
        """Says which nodes torch runs, once."""
        lines = [
            f"{module_in_words(node.module_path)}: {node.attributes}: {node.attributes.reason}"
            for node in executable.graph.nodes()
            if isinstance(node.attributes, TorchCall)
        ]
        if new := [line for line in dict.fromkeys(lines) if line not in self._told]:
            self._told.update(new)
            told = [f"convloom: {executable.graph.name} runs as torch ops:", *new]
            warnings.warn("\n  ".join(told), stacklevel=2)


def _kind(source: Node) -> str:
    """What a placeholder stands for; "" for what no executable takes."""
    value = source.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return SIZE
    if not isinstance(value, torch.Tensor):
        return ""
    if source.op == "get_attr":
        return WEIGHT
    if source.meta["grapharg"].pass_arg_as_tensor:
        return NUMBER
    # So TorchDynamo marks parameters, buffers and other tensors that modules hold.
    marked = source.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return WEIGHT if marked == "unguarded" else INPUT


def _sources(module: GraphModule) -> list[Node]:
    """What a graph takes, then the weights that it holds itself, under settings that trust them."""
    nodes = module.graph.nodes
    held = {node.target: node for node in nodes if node.op == "get_attr" and _is_tensor(node)}
    return [*(node for node in nodes if node.op == "placeholder"), *held.values()]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _is_symbolic(source: Node) -> bool:
    value = source.meta.get("example_value")
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _batches(sources: Sequence[Node], kinds: Sequence[str]) -> tuple[int, int | None] | None:
    """The range of the batch, without an end where it is open or far away, if dimension 0 of every
    input is the batch and nothing else varies."""
    batches: list[Any] = []
    for source, kind in zip(sources, kinds, strict=True):
        value: Any = source.meta.get("example_value")
        if kind == SIZE:
            batches.append(value)
        elif kind == INPUT:
            if any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
                return None
            batches.append(value.shape[0] if value.dim() else 1)
    if not batches or not all(isinstance(batch, torch.SymInt) for batch in batches):
        return None
    batch = batches[0].node
    if not batch.expr.is_Symbol or any(each.node.expr != batch.expr for each in batches):
        return None
    bounds = batch.shape_env.bound_sympy(batch.expr)
    return int(bounds.lower), int(bounds.upper) if bounds.upper <= LARGEST_WHOLE_RANGE else None


def _why_not(module: GraphModule, kinds: Sequence[str], examples: Sequence[Any]) -> str:
    """Why a graph cannot be an executable, whose results are new tensors without gradients and
    which writes nothing else; "" where it can."""
    *_, output = module.graph.nodes
    results = [
        leaf.meta["example_value"]
        for leaf in dict.fromkeys(pytree.tree_leaves(output.args[0]))
        if isinstance(leaf, Node) and _is_tensor(leaf)
    ]
    if any(result.requires_grad for result in results):
        return (
            "its results need gradients, which executables do not have: call it under "
            "torch.no_grad() or torch.inference_mode()"
        )
    sources = _sources(module)
    for source, kind, example in zip(sources, kinds, examples, strict=True):
        value, name = source.meta.get("example_value"), _source_of(source, module)
        if not kind or example is None:
            return f"it takes {name}, {value}, which is not a tensor, size or number"
        if kind == WEIGHT and example.is_inference():
            return (
                f"{name} was made under torch.inference_mode, so that nobody can "
                "see it change: make the module outside, or compile it with convloom.compile"
            )
        if isinstance(value, torch.Tensor) and value._version:
            return f"it writes its input {name}"
    tensors = [source.meta["example_value"] for source in sources]
    known = [x for x in (*tensors, *results) if isinstance(x, torch.Tensor)]
    if len({x.untyped_storage()._cdata for x in known}) < len(known):
        return "a result is a view of an input, or of another result"
    return ""


def _enter_autocast(*arguments: Any) -> Any:
    """Torch's own only notes the call while an export looks on; this enters the region as well."""
    kind, dtype, enabled, cache = arguments
    region = torch.amp.autocast(kind, dtype, enabled, cache)
    region.__enter__()  # type: ignore[no-untyped-call]
    return region


_IN_EXPORT: dict[Any, Callable[..., Any]] = {
    autocast_mode._enter_autocast: _enter_autocast,
    autocast_mode._exit_autocast: lambda region: region.__exit__(None, None, None),
}


class _Number(float):
    """A number where the graph expects a tensor that holds it."""

    def item(self) -> float:
        return float(self)


class _Replay(nn.Module):
    """A graph of TorchDynamo as a module of its caller's tensors; the weights have their paths."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self._run = Interpreter(graph).run
        self.values: list[Callable[[Sequence[torch.Tensor]], Any]] = []

    def forward(self, *inputs: torch.Tensor) -> Any:
        with preserve_node_meta():
            return self._run(*(value(inputs) for value in self.values))

    def hold(self, path: str, tensor: torch.Tensor) -> None:
        """Registers a weight at a dotted path; it is the graph's next argument."""
        owner: nn.Module = self
        *names, last = path.split(".")
        for name in names:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.register_buffer(last, tensor.detach())
        self.values.append(lambda _: owner.get_buffer(last))


def _untangled(module: GraphModule) -> tuple[GraphModule, list[str]]:
    """A copy of the graph, with module paths as its user writes them, and the paths of what it
    takes."""
    graph, sources = Graph(), _sources(module)
    taken = {source: graph.placeholder(source.name) for source in sources}
    graph.output(graph.graph_copy(module.graph, taken))
    path = _paths_below_root(graph)
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            renamed = {key: (path(name), kind) for key, (name, kind) in stack.items()}
            node.meta["nn_module_stack"] = renamed
        if node.target is torch._C._set_grad_enabled:  # Nothing has gradients.
            graph.erase_node(node)
        elif node.op == "call_function":
            node.target = _IN_EXPORT.get(node.target, node.target)
    # TorchDynamo forgets where they come from when the backend returns.
    names = (_source_of(source, module) for source in sources)
    return GraphModule(module, graph), list(map(path, names))


def _source_of(source: Node, module: GraphModule) -> str:
    """Where a value comes from, as Python: "L['self']._modules['fc'].weight"."""
    if source.op == "placeholder":
        return str(source.meta["grapharg"].source.name)
    names: Any = module._param_name_to_source
    return str(names[source.target].name)


def _paths_below_root(graph: Graph) -> Callable[[str], str]:
    """What turns TorchDynamo's expressions of modules and weights into paths below the module that
    all of them belong to, or below the variables that hold several such modules."""
    names = [
        name
        for node in graph.nodes
        for name, _ in (node.meta.get("nn_module_stack") or {}).values()
    ]
    roots = {_dotted(name).partition(".")[0] for name in names}

    def path(name: str) -> str:
        root, _, rest = _dotted(name).partition(".")
        return rest if roots <= {root} else f"{root}.{rest}".rstrip(".")

    return path


def _dotted(name: str) -> str:
    """ "L['self']._modules['c'].l[0].weight" as "self.c.l.0.weight"."""
    name = re.sub(r"^[LG]\[", "[", name)
    name = re.sub(r"\._(?:modules|parameters|buffers)\[", "[", name)
    return re.sub(r"\[['\"]?([^]'\"]*)['\"]?\]", r".\1", name).lstrip(".")


def _name_of(module: GraphModule) -> str:
    """The class of the module that the graph is of, where the graph knows it, else its number."""
    for node in module.graph.nodes:
        for name, kind in (node.meta.get("nn_module_stack") or {}).values():
            if "." not in _dotted(name):
                return str(getattr(kind, "__name__", kind))
    return f"graph {module.meta.get('dynamo_compile_id', '')}".strip()
