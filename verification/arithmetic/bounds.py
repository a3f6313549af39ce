"""Every threshold of the gate: which values of each output an honest implementation can produce.

The reference gives each quantity's exact value q from operands at their *centres*; `accumulation` bounds by e how far
an fp32 accumulator can be from q. What is then rounded by R has the centre R(q) and the radius

    ρ(q, e) = max(|R(q + e) − R(q)|, |R(q − e) − R(q)|)

and enters later formulas with both. An output is accepted in [R(q − e), R(q + e)]; R is monotonic, so nothing honest
lies outside. Nothing here is calibrated against an implementation.
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
from mxref.verification.arithmetic.accumulation import UNDERFLOW, Accumulation, Accumulator, Product, U, gamma
from mxref.verification.arithmetic.interval import Error, Estimate, Interval, rho

TENSORS = ("Y", "dX", "dA", "dB", "dbias", "dgates")


def intervals(
    problem: Problem,
    fwd: Forward,
    bwd: Backward | None,
    grad_out: Tensor,
    points: RoundingPoints,
    accumulation: Accumulation,
) -> dict[str, Interval]:
    """Accepted intervals of the output and of every gradient that the problem has.

    Args:
        problem: the operands.
        fwd, bwd: the reference's passes under the same `points`; without `bwd`, only "Y" is returned.
        grad_out: dOut, the gradient of the output.
        points: declared rounding points.
        accumulation: declared accumulation.

    Returns:
        From "Y", "dX", "dA", "dB", "dbias", "dgates" to intervals in the caller's layout, on the problem's device.
    """
    judge = _Propagation(problem, fwd, grad_out.detach().double(), points, accumulation)
    return judge.output() if bwd is None else judge.output() | judge.gradients(bwd)


class _Propagation:
    """Walks one call in the order of its data, expert by expert: one decoded weight matrix is alive at a time."""

    def __init__(
        self, problem: Problem, fwd: Forward, grad_out: Tensor, points: RoundingPoints, how: Accumulation
    ) -> None:
        self.problem, self.fwd, self.grad_out, self.points, self.how = problem, fwd, grad_out, points, how
        self.x = expert_order_inputs(problem)
        self.y_error = Error.zeros_like(fwd.y.exact)
        self.z_radius = None if fwd.z is None else torch.zeros_like(fwd.z.exact)
        for e, start, end in problem.segments():
            self._forward(e, slice(start, end))
        self.y = self._rows_of_y()

    def accumulator(self, rows: int, columns: int) -> Accumulator:
        return Accumulator(self.how, self.problem.dtype, rows, columns, self.x.device)

    def product(
        self, name: Product, P: Tensor, Q: Tensor, P_radius: Tensor | None = None, Q_radius: Tensor | None = None
    ) -> Accumulator:
        accumulator = self.accumulator(P.shape[0], Q.shape[1])
        accumulator.dot(P, Q, name, P_radius, Q_radius)
        return accumulator

    def adapters(self, e: int) -> tuple[Tensor, Tensor, float]:
        """A, B and the factor still to be applied to their products, as declared."""
        A, B = self.problem.expert_lora(e)
        if self.points.scaling_in_B:
            return A, self.points.R(self.problem.scaling * B).value, 1.0
        return A, B, self.problem.scaling

    def inner(self, q: Tensor, e: Tensor) -> Estimate:
        """Z or V after its rounding point, if it has one."""
        dtype = self.points.dtype if self.points.z else None
        return Estimate(round_to(q, dtype), rho(q, e, dtype))

    def _forward(self, e: int, rows: slice) -> None:
        """r_Y = E_K(x, W) + |s|·(r_Z·|B|ᵀ + E_r(Z, B)) + what the chain adds, with |Z| + r_Z inside E."""
        x, problem = self.x[rows], self.problem
        bias = None if problem.expert_biases is None else problem.expert_biases[e].detach().double()[None, :]
        low = None
        if self.fwd.z is not None and self.z_radius is not None:
            A, B, s = self.adapters(e)
            z = self.inner(self.fwd.z.exact[rows], self.product("Z", x, A.T).radius())
            self.z_radius[rows] = z.radius
            low = (z, B.T, s)
        self.y_error.set(rows, *self.chain("Y", (x, problem.expert_weight(e), None), low, bias))

    def chain(
        self,
        name: Product,
        base: tuple[Tensor, Tensor, Estimate | None],
        low: tuple[Estimate, Tensor, float] | None,
        bias: Tensor | None = None,
    ) -> Error:
        """Of Y or D before its rounding: the base product and LoRA's, brought together as declared."""
        P, Q, estimate = base
        P_radius = None if estimate is None else estimate.radius
        shared = torch.zeros_like(P[:, :1] * Q[:1]) if estimate is None else estimate.draws @ Q.abs()
        main = self.accumulator(P.shape[0], Q.shape[1])
        inside = self.how.bias_inside and bias is not None
        if low is None:
            if inside and bias is not None:
                main.add(bias.expand_as(main.value))
            main.dot(P, Q, name, P_radius)
        else:
            inner, factor, s = low
            shared = shared + abs(s) * (inner.draws @ factor.abs())
            first = self.how.lora == "first" and not self.points.lora_after_output
            side = main if first else self.accumulator(P.shape[0], Q.shape[1])
            side.dot(inner.centre, factor, None, inner.radius)
            if first:
                side.scale(s)
            if inside and bias is not None:
                main.add(bias.expand_as(main.value))
            main.dot(P, Q, name, P_radius)
            if self.points.lora_after_output:
                if bias is not None and not inside:
                    main.add(bias)
                return Error(self._rounded_apart(main, side, s), Q.shape[1] ** 0.5 * shared)
            if not first:
                side.scale(s)
                main.add(side)
        if bias is not None and not inside:
            main.add(bias)
        return Error(main.radius(), Q.shape[1] ** 0.5 * shared)

    def _rounded_apart(self, main: Accumulator, side: Accumulator, s: float) -> Tensor:
        """Declared: R(base) + R(s·R(low)), one fp32 addition of two values of the activation dtype."""
        dtype = self.points.dtype
        base = Estimate(round_to(main.value, dtype), rho(main.value, main.radius(), dtype))
        low = Estimate(round_to(side.value, dtype), rho(side.value, side.radius(), dtype))
        scaled, error = s * low.centre, abs(s) * (low.radius + 2 * U * low.reach)
        low = Estimate(round_to(scaled, dtype), rho(scaled, error, dtype))
        return base.radius + low.radius + 2 * U * (base.reach + low.reach)

    def _rows_of_y(self) -> Estimate:
        """Y as the gates meet it."""
        y = self.fwd.y
        if self.points.gates_before_output:
            return Estimate(y.exact, self.y_error.radius)
        return Estimate(y.value, rho(y.exact, self.y_error.radius, self.points.dtype))

    def output(self) -> dict[str, Interval]:
        """The caller's output; with gates Σ|g|·r_Y + γ_(g+1)·Σ|g·Y|, a product and g − 1 additions a slot."""
        problem, error = self.problem, self.y_error
        if problem.gates is None:
            error = error if problem.grouped_out else error.each(self.by_position)
        else:
            gates, shape = expert_order_gates(problem).abs()[:, None], (*problem.gates.shape, problem.N)
            radius = gates * (self.y.radius + gamma(problem.gates.shape[1] + 1) * self.y.reach) + UNDERFLOW
            owned = Error(radius, gates * error.shared).each(owned_rows(problem)[:, None].mul)
            error = owned.each(lambda rows: self.by_position(rows).view(shape).sum(1))
        return {"Y": self.accept(self.fwd.out, error, self.points.dtype)}

    def gradients(self, bwd: Backward) -> dict[str, Interval]:
        """Every gradient that the problem has."""
        problem, points = self.problem, self.points
        dy, results = self._split(bwd)
        d_error = Error.zeros_like(bwd.d.exact)
        errors = {
            name: None if rounded is None else Error.zeros_like(rounded.exact)
            for name, rounded in (("dA", bwd.dA), ("dB", bwd.dB), ("dbias", bwd.dbias))
        }
        for e, start, end in problem.segments():
            rows = slice(start, end)
            self._backward(e, rows, dy[rows], bwd, d_error, errors)
        d = Estimate(bwd.d.value, rho(bwd.d.exact, d_error.radius, points.dtype))
        fan_out = Error(*map(self._sum_over_fan_out, (d.radius + self._adding(d), d_error.shared)))
        results["dX"] = self.accept(bwd.dx, fan_out, points.dtype)
        for name, rounded, parameter in (
            ("dA", bwd.dA, problem.lora_A),
            ("dB", bwd.dB, problem.lora_B),
            ("dbias", bwd.dbias, problem.expert_biases),
        ):
            error = errors[name]
            if rounded is not None and parameter is not None and error is not None:
                results[name] = self.accept(rounded, error, self.stored(parameter))
        return results

    def _split(self, bwd: Backward) -> tuple[Estimate, dict[str, Interval]]:
        """dY and, with gates, their gradient: Σ|dOut|·r_Y + γ_(N+1)·Σ|Y·dOut|, and ρ(g·dOut, u·|g·dOut|)."""
        problem = self.problem
        if problem.gates is None or bwd.dgates is None:
            return Estimate(bwd.dy.value, torch.zeros_like(bwd.dy.value)), {}
        owned = owned_rows(problem)[:, None]
        incoming = self.grad_out[problem.row_positions() // problem.gates.shape[1]].abs()
        each = incoming * (self.y.radius + gamma(problem.N + 1) * self.y.reach) + UNDERFLOW
        radius = self.by_position(torch.where(owned, each, 0.0).sum(1)).view(problem.gates.shape)
        dy = Estimate(bwd.dy.value, rho(bwd.dy.exact, U * bwd.dy.exact.abs() + UNDERFLOW, self.points.dtype))
        return dy, {"dgates": self.accept(bwd.dgates, Error(radius, radius), self.stored(problem.gates))}

    def _backward(
        self, e: int, rows: slice, dy: Estimate, bwd: Backward, d_error: Error, errors: dict[str, Error | None]
    ) -> None:
        """V, D and the parameters of one expert; its share of `d_error` and `errors` is filled."""
        problem, points, x = self.problem, self.points, self.x[rows]
        dbias, dA, dB = errors["dbias"], errors["dA"], errors["dB"]
        n = dy.centre.shape[0]
        if dbias is not None:
            dbias.set(slice(e, e + 1), dy.radius.sum(0) + gamma(n) * dy.reach.sum(0), dy.draws.sum(0))
        low = None
        if bwd.v is not None and self.fwd.z is not None and self.z_radius is not None:
            A, B, s = self.adapters(e)
            v = self.inner(bwd.v.exact[rows], self.product("V", dy.centre, B, dy.radius).radius())
            low = (v, A, s)
            own = slice(e * problem.rank, (e + 1) * problem.rank)
            if dA is not None:
                of_A = self.product("dA", v.centre.T, x, v.radius.T)
                of_A.scale(s)
                dA.set(own, of_A.radius(), problem.K**0.5 * abs(s) * (v.draws.T @ x.abs()))
            if dB is not None:
                z_dtype = points.dtype if points.z else None
                z = Estimate(round_to(self.fwd.z.exact[rows], z_dtype), self.z_radius[rows])
                of_B = self.product("dB", dy.centre.T, z.centre, dy.radius.T, z.radius)
                of_B.scale(problem.scaling)
                of_dy, of_z = dy.draws.T @ z.reach, dy.centre.abs().T @ z.draws
                shared = problem.rank**0.5 * of_dy + problem.N**0.5 * of_z
                dB.set((slice(None), own), of_B.radius(), abs(problem.scaling) * shared)
        d_error.set(rows, *self.chain("D", (dy.centre, problem.expert_weight(e).T, dy), low))

    def _adding(self, d: Estimate) -> Tensor | float:
        """k·u·|D|, where the D of k slots are added up."""
        alone = self.problem.grouped_in or self.problem.k == 1
        return 0.0 if alone else gamma(self.problem.k) * d.reach

    def _sum_over_fan_out(self, rows: Tensor) -> Tensor:
        """From the slots' rows of D, in expert order, to the rows of dX."""
        problem = self.problem
        if problem.grouped_in:
            return rows
        return self.by_position(rows).view(problem.inputs.shape[0], problem.k, problem.K).sum(1)

    def by_position(self, rows: Tensor) -> Tensor:
        """From expert order to position order."""
        scattered = torch.empty_like(rows)
        scattered[self.problem.row_positions()] = rows
        return scattered

    def stored(self, parameter: Tensor) -> torch.dtype | None:
        """The dtype that a parameter's gradient is rounded to; None where that is fp32 or where nothing is rounded."""
        narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        return parameter.dtype if narrow and self.points.dtype is not None else None

    @staticmethod
    def accept(rounded: Rounded, error: Error, dtype: torch.dtype | None) -> Interval:
        """[R(q − e), R(q + e)] around a reference value."""
        exact, e = rounded.exact, error.radius
        return Interval(round_to(exact - e, dtype), round_to(exact + e, dtype), exact, e, error.shared)
