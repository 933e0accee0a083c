"""Changes of a source file in one place: another operator, constant or order, a call or a result left out."""

import ast
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
OTHER_OPERATOR = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult},
}
OTHER_NAME = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Nothing below these is changed: messages, and types.
LEFT_OUT = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)


def changes(node: ast.AST) -> Iterator[str]:
    """What may stand in place of ``node``, as source."""
    copy = deepcopy(node)
    match node:
        case ast.Compare(ops=[operator]) | ast.BoolOp(op=operator) | ast.BinOp(op=operator) if (
            type(operator) in OTHER_OPERATOR
        ):
            other = OTHER_OPERATOR[type(operator)]()
            copy.ops, copy.op = [other], other
            yield f"({ast.unparse(copy)})"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=bool() as value):
            yield repr(not value)
        case ast.Constant(value=int() | float() as value):
            yield repr(value + 1)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield f"({ast.unparse(orelse)} if {ast.unparse(test)} else {ast.unparse(body)})"
        case ast.Name(id=name) if name in OTHER_NAME:
            yield OTHER_NAME[name]
        case ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return None"
        case ast.Call(args=[first, second, *rest]) if not any(isinstance(a, ast.Starred) for a in (first, second)):
            copy.args = [second, first, *rest]
            yield ast.unparse(copy)
        case ast.Call(keywords=[_, *_]):
            copy.keywords = copy.keywords[1:]
            yield ast.unparse(copy)


def walk(node: ast.AST, function: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """All nodes that may change, each with the first line of the function that it stands in; 0 is none."""
    if isinstance(node, ast.FunctionDef):
        function = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns") and not isinstance(child, LEFT_OUT):
                yield child, function
                yield from walk(child, function)


def mutants_of(path: Path) -> list[dict]:
    """Every change of a file: where, what, into what."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, function in walk(ast.parse(source)):
        for text in changes(node):
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            found.append({
                "file": str(path.relative_to(PROJECT)), "line": node.lineno, "function": function, "begin": begin,
                "end": end, "before": " ".join(source[begin:end].decode().split()), "after": text,
            })  # fmt: skip
    return found


def draw(sample: int, seed: int) -> list[dict]:
    """``sample`` changes or a few more, from each file in proportion to how many it has, at least one."""
    by_file = [mutants_of(path) for path in sorted((PROJECT / "adala").rglob("*.py"))]
    total, generator = sum(map(len, by_file)), random.Random(seed)
    return [m for of in by_file if of for m in generator.sample(of, max(1, round(sample * len(of) / total)))]
