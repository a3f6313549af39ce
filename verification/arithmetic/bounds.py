"""The gate's thresholds: values of each output that an honest implementation can produce.

The reference gives each quantity's exact value q from operands at their *centres*; an fp32 accumulator is within e of
q. Rounded by R, it has the centre R(q) and the radius

    ρ(q, e) = max(|R(q + e) − R(q)|, |R(q − e) − R(q)|)

and enters later formulas with both. An output is accepted in [R(q − e), R(q + e)]; R is monotonic, so nothing honest
lies outside. What depends on a value that may or may not overflow in its rounding is undecided. Nothing is calibrated
against an implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to
from mxref.scattermoe import (
    Backward,
    Forward,
    Rounded,
    RoundingPoints,
    expert_order_gates,
    expert_order_inputs,
    owned_rows,
)
from mxref.verification.arithmetic.accumulation import Accumulation, Product
from mxref.verification.arithmetic.accumulator import UNDERFLOW, Accumulator, U, gamma
from mxref.verification.arithmetic.interval import Estimate, Interval, may_overflow, rho
from mxref.verification.arithmetic.metrics import ulp

TENSORS = ("Y", "dX", "dA", "dB", "dbias", "dgates")


def intervals(
    problem: Problem,
    fwd: Forward,
    bwd: Backward | None,
    grad_out: Tensor,
    points: RoundingPoints,
    accumulation: Accumulation,
) -> dict[str, Interval]:
    """Accepted intervals of the output and of every gradient.

    Args:
        fwd, bwd: the reference's passes under `points`; without `bwd`, only "Y" is returned.
        grad_out: dOut.
        points, accumulation: declared.

    Returns:
        From "Y", "dX", "dA", "dB", "dbias", "dgates" to intervals in the caller's layout, on the problem's device.
    """
    judge = Propagation(problem, fwd, grad_out.detach().double(), points, accumulation)
    return judge.output() if bwd is None else judge.output() | judge.gradients(bwd)


class Propagation:
    """Walks one call, expert by expert: one decoded weight matrix is alive at a time.

    Attributes:
        z, v: what Z and V can be, [P, r] in expert order; None without LoRA, V also before `gradients`.
        y: what the rows of Y can be as the gates meet them, [P, N].
        dy: what dY can be; None where it can be one value only, and before `gradients`.
        d: what the rows of D can be; None before `gradients`.
        undecided: bool, where Z, V, and what becomes of the rows of Y and D, may or may not have overflowed; in expert
            order, absent without such an element.
    """

    def __init__(
        self, problem: Problem, fwd: Forward, grad_out: Tensor, points: RoundingPoints, how: Accumulation
    ) -> None:
        self.problem, self.fwd, self.grad_out, self.points, self.how = problem, fwd, grad_out, points, how
        self.x = expert_order_inputs(problem)
        self.y_error = torch.zeros_like(fwd.y.exact)
        self.z = None if fwd.z is None else Estimate.zeros_like(fwd.z.exact)
        self.v: Estimate | None = None
        self.dy: Estimate | None = None
        self.d: Estimate | None = None
        self.undecided: dict[Product, Tensor] = {}
        for e, start, end in problem.segments():
            self._forward(e, slice(start, end))
        self.y = self._rows_of_y()

    def _accumulator(self, rows: int, columns: int) -> Accumulator:
        return Accumulator(self.how, self.problem.dtype, rows, columns, self.x.device)

    def _product(
        self, name: Product, P: Tensor, Q: Tensor, P_radius: Tensor | None = None, Q_radius: Tensor | None = None
    ) -> Accumulator:
        accumulator = self._accumulator(P.shape[0], Q.shape[1])
        accumulator.dot(P, Q, name, P_radius, Q_radius)
        return accumulator

    def adapters(self, e: int) -> tuple[Tensor, Tensor, float]:
        """A, B and the factor still to be applied to their products."""
        A, B = self.problem.expert_lora(e)
        if self.points.scaling_in_B:
            return A, self.points.R(self.problem.scaling * B).value, 1.0
        return A, B, self.problem.scaling

    def _rounded(self, name: Product, rows: slice, q: Tensor, e: Tensor, dtype: torch.dtype | None) -> Estimate:
        """Rows of R(q + δ), |δ| ≤ e, for later formulas."""
        found = may_overflow(q, e, dtype)
        if found is not None:
            everywhere = q.new_zeros(self.problem.P, q.shape[1], dtype=torch.bool)
            self.undecided.setdefault(name, everywhere)[rows] |= found
        return Estimate(round_to(q, dtype), rho(q, e, dtype))

    def _inner(self, name: Product, rows: slice, q: Tensor, e: Tensor) -> Estimate:
        """Z or V after its rounding point, if any."""
        return self._rounded(name, rows, q, e, self.points.dtype if self.points.z else None)

    def _forward(self, e: int, rows: slice) -> None:
        """r_Y = E_K(x, W) + |s|·(r_Z·|B|ᵀ + E_r(Z, B)) + what the chain adds, with |Z| + r_Z inside E."""
        x, problem = self.x[rows], self.problem
        bias = None if problem.expert_biases is None else problem.expert_biases[e].detach().double()[None, :]
        low = None
        if self.fwd.z is not None and self.z is not None:
            A, B, s = self.adapters(e)
            z = self._inner("Z", rows, self.fwd.z.exact[rows], self._product("Z", x, A.T).radius())
            self.z.set(rows, z)
            low = (z, B.T, s)
        self.y_error[rows] = self._chain("Y", rows, (x, problem.expert_weight(e), None), low, bias)

    def _chain(
        self,
        name: Product,
        rows: slice,
        base: tuple[Tensor, Tensor, Tensor | None],
        low: tuple[Estimate, Tensor, float] | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Radius of Y or D before its rounding: the base product and LoRA's, joined as declared."""
        P, Q, P_radius = base
        main = self._accumulator(P.shape[0], Q.shape[1])
        inside = self.how.bias_inside and bias is not None
        if low is None:
            if inside and bias is not None:
                main.add(bias.expand_as(main.value))
            main.dot(P, Q, name, P_radius)
        else:
            inner, factor, s = low
            first = self.how.lora == "first" and not self.points.lora_after_output
            side = main if first else self._accumulator(P.shape[0], Q.shape[1])
            side.dot(inner.centre, factor, None, inner.radius)
            if first:
                side.scale(s)
            if inside and bias is not None:
                main.add(bias.expand_as(main.value))
            main.dot(P, Q, name, P_radius)
            if self.points.lora_after_output:
                if bias is not None and not inside:
                    main.add(bias)
                return self._rounded_apart(name, rows, main, side, s)
            if not first:
                side.scale(s)
                main.add(side)
        if bias is not None and not inside:
            main.add(bias)
        return main.radius()

    def _rounded_apart(self, name: Product, rows: slice, main: Accumulator, side: Accumulator, s: float) -> Tensor:
        """Declared: R(base) + R(s·R(low)), one fp32 addition of two values of the activation dtype."""
        dtype = self.points.dtype
        base = self._rounded(name, rows, main.value, main.radius(), dtype)
        low = self._rounded(name, rows, side.value, side.radius(), dtype)
        scaled, error = s * low.centre, abs(s) * (low.radius + 2 * U * low.reach)
        low = self._rounded(name, rows, scaled, error, dtype)
        return base.radius + low.radius + 2 * U * (base.reach + low.reach)

    def _rows_of_y(self) -> Estimate:
        y = self.fwd.y
        if self.points.gates_before_output:
            return Estimate(y.exact, self.y_error)
        if self.problem.gates is None:  # no formula follows
            return Estimate(y.value, rho(y.exact, self.y_error, self.points.dtype))
        return self._rounded("Y", slice(None), y.exact, self.y_error, self.points.dtype)

    def output(self) -> dict[str, Interval]:
        """The output; with gates Σ|g|·r_Y + γ_(g+1)·Σ|g·Y|, a product and g − 1 additions a slot."""
        problem, error, undecided = self.problem, self.y_error, self._undecided_rows("Y", "Z")
        if problem.gates is None:
            error = error if problem.grouped_out else self._by_position(error)
            if undecided is not None and not problem.grouped_out:
                undecided = self._by_position(undecided)
        else:
            gates = expert_order_gates(problem).abs()[:, None]
            slots = problem.gates.shape[1]
            each = gates * (self.y.radius + gamma(slots + 1) * self.y.reach) + UNDERFLOW
            counted = owned_rows(problem)[:, None] & (gates != 0)  # zero times what may be infinite is undecided
            each = torch.where(counted, each, 0.0)
            error = self._by_position(each).view(*problem.gates.shape, problem.N).sum(1)
            if undecided is not None:
                undecided = self._by_position(undecided).view(*problem.gates.shape, problem.N).any(1)
        return {"Y": self._accept(self.fwd.out, error, self.points.dtype, undecided)}

    def _undecided_rows(self, name: Product, inner: Product) -> Tensor | None:
        """Of Y or D in expert order; an undecided Z or V makes the whole row so."""
        rows, low = self.undecided.get(name), self.undecided.get(inner)
        if low is None:
            return rows
        columns = self.problem.N if name == "Y" else self.problem.K
        low = low.any(1, keepdim=True).expand(-1, columns)
        return low if rows is None else low | rows

    def _undecided_ranks(self, inner: Product) -> Tensor | None:
        """[E·r], of dA or dB: undecided in any of the expert's rows of Z or V."""
        low, r = self.undecided.get(inner), self.problem.rank
        if low is None:
            return None
        found = low.new_zeros(self.problem.E * r)
        for e, start, end in self.problem.segments():
            found[e * r : (e + 1) * r] = low[start:end].any(0)
        return found

    def gradients(self, bwd: Backward) -> dict[str, Interval]:
        """Every gradient."""
        problem, points = self.problem, self.points
        self.dy, results = self._split(bwd)
        dy = Estimate(bwd.dy.value, torch.zeros_like(bwd.dy.value)) if self.dy is None else self.dy
        self.v = None if bwd.v is None else Estimate.zeros_like(bwd.v.exact)
        d_error = torch.zeros_like(bwd.d.exact)
        errors = {
            name: None if rounded is None else torch.zeros_like(rounded.exact)
            for name, rounded in (("dA", bwd.dA), ("dB", bwd.dB), ("dbias", bwd.dbias))
        }
        for e, start, end in problem.segments():
            rows = slice(start, end)
            self._backward(e, rows, dy[rows], bwd, d_error, errors)
        self.d = self._rounded("D", slice(None), bwd.d.exact, d_error, points.dtype)
        undecided = self._undecided_rows("D", "V")
        if undecided is not None and not problem.grouped_in:
            undecided = self._by_position(undecided).view(-1, problem.k, problem.K).any(1)
        results["dX"] = self._accept(bwd.dx, self._sum_over_fan_out(self.d), points.dtype, undecided)
        of_A, of_B = self._undecided_ranks("V"), self._undecided_ranks("Z")
        for name, rounded, parameter, undecided in (
            ("dA", bwd.dA, problem.lora_A, None if of_A is None else of_A[:, None].expand(-1, problem.K)),
            ("dB", bwd.dB, problem.lora_B, None if of_B is None else of_B.expand(problem.N, -1)),
            ("dbias", bwd.dbias, problem.expert_biases, None),
        ):
            error = errors[name]
            if rounded is not None and parameter is not None and error is not None:
                results[name] = self._accept(rounded, error, self._stored(parameter), undecided)
        return results

    def _split(self, bwd: Backward) -> tuple[Estimate | None, dict[str, Interval]]:
        """dY, None if known exactly, and with gates their gradient: Σ|dOut|·r_Y + γ_(N+1)·Σ|Y·dOut|.

        A gate and dOut of 16 bits have at most 22 significant bits together, so fp32 holds their product, and R rounds
        it once: dY is the same for everyone, also beyond fp32's range. A product of bf16 with bits below 2^-149 is at
        most 255²·2^-150, under half of bf16's smallest number: 0 with or without fp32 in between; from 2^128 on, both
        are infinite. Where R is the identity, a gate may meet dOut sooner or later: ±u·|g·dOut|.
        """
        problem, exact = self.problem, bwd.dy.exact
        if problem.gates is None or bwd.dgates is None:
            return None, {}
        owned = owned_rows(problem)[:, None]
        incoming = self.grad_out[problem.row_positions() // problem.gates.shape[1]].abs()
        each = incoming * (self.y.radius + gamma(problem.N + 1) * self.y.reach) + UNDERFLOW
        radius = self._by_position(torch.where(owned & (incoming != 0), each, 0.0).sum(1)).view(problem.gates.shape)
        dy = Estimate(exact, U * exact.abs() + UNDERFLOW) if self.points.dtype is None else None
        undecided = self._undecided_rows("Y", "Z")
        if undecided is not None:
            undecided = self._by_position(undecided.any(1)).view(problem.gates.shape)
        return dy, {"dgates": self._accept(bwd.dgates, radius, self._stored(problem.gates), undecided)}

    def _backward(
        self, e: int, rows: slice, dy: Estimate, bwd: Backward, d_error: Tensor, errors: dict[str, Tensor | None]
    ) -> None:
        """V, D and the parameters of one expert; fills its share of `d_error` and `errors`."""
        problem, x = self.problem, self.x[rows]
        dbias, dA, dB = errors["dbias"], errors["dA"], errors["dB"]
        n = dy.centre.shape[0]
        if dbias is not None:
            dbias[e] = dy.radius.sum(0) + gamma(n) * dy.reach.sum(0)
        low = None
        if bwd.v is not None and self.z is not None and self.v is not None:
            A, B, s = self.adapters(e)
            v = self._inner("V", rows, bwd.v.exact[rows], self._product("V", dy.centre, B, dy.radius).radius())
            self.v.set(rows, v)
            low = (v, A, s)
            own = slice(e * problem.rank, (e + 1) * problem.rank)
            if dA is not None:
                of_A = self._product("dA", v.centre.T, x, v.radius.T)
                of_A.scale(s)
                dA[own] = of_A.radius()
            if dB is not None:
                z = self.z[rows]
                of_B = self._product("dB", dy.centre.T, z.centre, dy.radius.T, z.radius)
                of_B.scale(problem.scaling)
                dB[:, own] = of_B.radius()
        d_error[rows] = self._chain("D", rows, (dy.centre, problem.expert_weight(e).T, dy.radius), low)

    def _sum_over_fan_out(self, d: Estimate) -> Tensor:
        """Radius of dX before its rounding: Σ_slots r_D, and k·u·Σ|D| where sums round.

        Rows in 16 bits are multiples of their finest spacing; where Σ|D| is below 2^24 of it, fp32 sums are exact.
        """
        problem, dtype = self.problem, self.points.dtype
        if problem.grouped_in or problem.k == 1:
            return d.radius if problem.grouped_in else self._by_position(d.radius)

        def slots(rows: Tensor) -> Tensor:
            return self._by_position(rows).view(problem.inputs.shape[0], problem.k, problem.K)

        radius, reach = slots(d.radius).sum(1), slots(d.reach).sum(1)
        rounding = gamma(problem.k) * reach
        if dtype is not None:
            spacing = torch.where(d.reach > 0, ulp((d.centre.abs() - d.radius).clamp(min=0), dtype), torch.inf)
            rounding = torch.where(reach < 2.0**24 * slots(spacing).amin(1), 0.0, rounding)
        return radius + rounding

    def _by_position(self, rows: Tensor) -> Tensor:
        scattered = torch.empty_like(rows)
        scattered[self.problem.row_positions()] = rows
        return scattered

    def _stored(self, parameter: Tensor) -> torch.dtype | None:
        """The dtype that a parameter's gradient is rounded to; None for fp32 or no rounding."""
        narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        return parameter.dtype if narrow and self.points.dtype is not None else None

    @staticmethod
    def _accept(
        rounded: Rounded, error: Tensor, dtype: torch.dtype | None, undecided: Tensor | None = None
    ) -> Interval:
        """[R(q − e), R(q + e)] around a reference value."""
        exact = rounded.exact
        return Interval(round_to(exact - error, dtype), round_to(exact + error, dtype), exact, error, undecided, dtype)
