"""What a part's expressions add to a kernel as text: gates, scores, masks, and their derivatives."""

from __future__ import annotations

from flexsparse.codegen.gathering.parts import ONE, Part
from flexsparse.codegen.triton_text import TritonText
from flexsparse.ir.derivative import derivative
from flexsparse.ir.nodes import TRUE, Node, Symbol, mentions, replaced, walk
from flexsparse.ir.program import Gate, Program, Selected
from flexsparse.ir.simplify import simplify

_GATES = {
    "": "clipped({x}, {least})",
    "capped_softmax": "tl.where({x} <= tl.log({least}), {least}, tl.exp(tl.where({x} >= 0.0, 0.0, {x})))",
}
# Numbers even where x is none, which then is for others to say: in the forward pass for the product of query and key,
# in the backward pass for p where the query sees the key; p is 0 elsewhere.
_FINITE_GATES = {
    "": "saturated({x}, {least})",
    "capped_softmax": "tl.maximum(tl.exp(tl.minimum({x}, 0.0)), {least})",
}
# Where a gate has a slope, "" for everywhere, and the slope there, "" for 1.
_SLOPES = {
    "": ("({m} > {least}) & ({m} < 1.0)", ""),
    "ste": ("({x} > {least}) & ({x} < 1.0)", ""),
    "capped_softmax": ("({x} > tl.log({least})) & ({x} < 0.0)", "tl.exp(tl.where({x} >= 0.0, 0.0, {x}))"),
    "ste_identity": ("", ""),
    "ste_sigmoid": ("", "tl.sigmoid({x}) * (1.0 - tl.sigmoid({x}))"),
}


def _kind(gate: Gate) -> str:
    return "capped_softmax" if gate.capped else gate.through


class Printer:
    """The lines that a part adds to a kernel, in forward and in backward.

    They use ``u_n`` by key, and ``tau_n``, ``known_tau_n`` (0 for NaN) and ``least_n`` by query, which the kernel loads
    where it knows them.
    """

    def __init__(self, program: Program, shifted: list[int]) -> None:
        self.program, self.shifted = program, shifted
        self.text = TritonText()

    def sure(self, part: Part) -> int | None:
        """The selection whose gate every key of the part has, if that is its only gate, and it is not straight-through.

        Its keys have scores, so only the query's threshold can be NaN: the product of query and key takes that in.
        """
        now = part.forward()
        free = not any(isinstance(n, Selected) for e in now.expressions for n in walk(e))
        return now.gates[0].number if free and len(now.gates) == 1 else None

    def loads(self, part: Part, slopes: bool, told: bool) -> list[str]:
        """Gates, with ``slopes`` as the backward pass wants them, and who is selected, unless the loop has ``told``."""
        lines = []
        selected = {n.number for e in part.expressions for n in walk(e) if isinstance(n, Selected)}
        for n in sorted(selected if not told else ()):
            at = f"(b * heads_{n} + h // group_{n}) * length + kv"
            lines.append(f"selected_{n} = (tl.load(p_birth_{n} + {at}) <= q) & (q < tl.load(p_death_{n} + {at}))")
        for gate in part.gates:
            n, through = gate.number, gate.through
            if through and not slopes:
                continue
            sure = self.sure(part) == n
            threshold = f"known_tau_{n}" if not slopes and sure else f"tau_{n}"
            lines.append(f"x_{n} = u_{n}" + ("" if through == "ste_identity" else f" - {threshold}"))
            if not through:
                made = (_FINITE_GATES if slopes or sure else _GATES)[_kind(gate)]
                lines.append(f"m_{n} = {made.format(x=f'x_{n}', least=f'least_{n}')}")
        return lines

    def score(self, part: Part) -> list[str]:
        """From ``raw``, scale times the product of query and key, to ``score``; -inf where the mask hides a key."""
        part = part.forward()
        lines = ["score = raw"]
        if part.gate_k != ONE:
            lines.append(f"gate_k = {self.text.emit(part.gate_k)}")
            lines.append("score = raw * gate_k")
        if part.score != Symbol("score"):
            lines.append(f"score = {self._shaped(part.score)}")
        if part.gate_logit != ONE:
            lines.append(f"score = score + tl.log({self.text.emit(part.gate_logit)})")
        return lines

    def is_scaled(self, part: Part) -> bool:
        """Whether ``score`` grows with ``raw`` in proportion."""
        part = part.forward()
        return part.score == Symbol("score") and part.gate_logit == ONE

    def _shaped(self, node: Node) -> str:
        text = self.text.emit(node)
        return text if mentions(node, "score") else f"0.0 * raw + ({text})"

    def seen(self, part: Part) -> str:
        """The mask as text, empty where every key is seen."""
        mask = part.forward().mask
        return "" if mask == TRUE else self.text.emit(mask)

    def value_gate(self, part: Part) -> str:
        """The gate on V as text, empty for 1."""
        gate = part.forward().gate_v
        return "" if gate == ONE else self.text.emit(gate)

    def slopes(self, part: Part, shown: str) -> list[str]:
        """From ``d_score`` and ``d_gate_v`` to ``d_raw``, and to ``d_x_n`` of every gate; ``shown``: where a key is."""
        ones: dict[Node, Node] = {gate: ONE for gate in part.gates if gate.through}
        now = part.forward()

        def printed(node: Node) -> str:
            return self.text.emit(simplify(replaced(node, ones)))

        inner = simplify(replaced(derivative(part.score, Symbol("score")), ones))
        lines = ["d_raw = d_score"]
        if inner != ONE:
            # The derivative is taken where the score expression is, at raw * gate_k.
            lines.insert(0, "score = raw * gate_k" if now.gate_k != ONE else "score = raw")
            lines[-1] = f"d_raw = d_score * ({self.text.emit(inner)})"
        for gate in part.gates:
            terms = []
            for what, base in (("gate_k", "d_raw * raw"), ("gate_v", "d_gate_v")):
                factor = printed(derivative(getattr(part, what), gate))
                if factor != "0.0":
                    terms.append(base if factor == "1.0" else f"{base} * ({factor})")
            factor = printed(derivative(part.gate_logit, gate))
            if factor != "0.0":
                logit = self.text.emit(now.gate_logit)
                terms.append(f"d_score * ({factor}) / ({logit})" if now.gate_logit != ONE else f"d_score * ({factor})")
            n, total = gate.number, " + ".join(terms) or "0.0 * raw"
            where, slope = (t.format(m=f"m_{n}", x=f"x_{n}", least=f"least_{n}") for t in _SLOPES[_kind(gate)])
            where = " & ".join(filter(None, (where, shown)))
            total = f"({total}) * ({slope})" if slope else total
            lines.append(f"d_x_{n} = " + (f"tl.where({where}, {total}, 0.0)" if where else total))
        if now.gate_k != ONE:
            lines.append("d_raw = d_raw * gate_k")
        if inner != ONE and shown:
            # The slope of a score may be anything where the key is hidden.
            lines.append(f"d_raw = tl.where({shown}, d_raw, 0.0)")
        return lines
