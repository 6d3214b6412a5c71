"""A graph as text, one line per node, and as DOT.

    %relu_3 = conv2d(%x, %w, %b) {stride=2x2} [add, relu] : float16[N, 64, 112, 112] nhwc  # conv1

The golden tests of passes compare this form.
"""

from __future__ import annotations

from .ir import CONSTANT, INPUT, OUTPUT, Graph, Node

COLORS = {"conv2d": "#cfe2ff", "linear": "#cfe2ff", INPUT: "#e2e3e5", OUTPUT: "#e2e3e5"}


def stages_text(node: Node) -> str:
    """The node's prologue and epilogue, or nothing."""
    before = f" <{', '.join(map(str, node.prologue))}>" if node.prologue else ""
    after = f" [{', '.join(map(str, node.epilogue))}]" if node.epilogue else ""
    return before + after


def node_text(graph: Graph, node: Node) -> str:
    """One line."""
    arguments = ", ".join(map(str, graph.inputs(node.name)))
    if node.op == OUTPUT:
        return f"return {arguments}"
    specs = ", ".join(map(str, node.outputs))
    path = f"  # {node.module_path}" if node.module_path else ""
    if node.op in (INPUT, CONSTANT):
        return f"%{node.name} = {node.op} : {specs}{path}"
    shown = str(node.attributes)
    braces = f" {{{shown}}}" if shown else ""
    return f"%{node.name} = {node.op}({arguments}){braces}{stages_text(node)} : {specs}{path}"


def to_text(graph: Graph, constants: bool = True) -> str:
    """The whole graph; sources come before their readers."""
    lines = [node_text(graph, node) for node in graph.nodes() if constants or node.op != CONSTANT]
    return "\n".join(lines) + "\n"


def to_dot(graph: Graph) -> str:
    """The graph for Graphviz, without constants, coloured by kind of op."""
    lines = [f'digraph "{graph.name}" {{', "  node [shape=box, style=filled, fontname=monospace];"]
    for node in graph.nodes():
        if node.op == CONSTANT:
            continue
        label = f"{node.op}{stages_text(node)}"
        if node.outputs:
            label += f"\\n{node.spec}"
        if node.module_path:
            label += f"\\n{node.module_path}"
        color = COLORS.get(node.op, "#fff3cd")
        lines.append(f'  "{node.name}" [label="{label}", fillcolor="{color}"];')
    for source, target in graph.net.edges():
        if graph.node(source).op != CONSTANT:
            lines.append(f'  "{source}" -> "{target}";')
    return "\n".join([*lines, "}"]) + "\n"
