"""The choice of charts: which coordinates are angles, have heavy tails, or end at a wall, as the density shows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.inference.starts.curvature import FULL_HESSIAN_UP_TO
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.pathfinder import pathfinder
from pyro_flows.inference.starts.prior import PRIOR_DRAWS, path_starts, possible_points, prior_draws, spread_of
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS
from pyro_flows.model.charts import Walls, write_chart
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Latent, messages
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import DENSITY_GAP_OF_NOTHING

FAR = (3e2, 1e3, 3e3)  # spreads of the prior, where a heavy tail falls off like a power
HEAVY = 9.0  # power up to which a tail counts as heavy: eight degrees of freedom


def choose_charts(density: LogDensity, start: Start | None, *, seed: int) -> tuple[LogDensity, Start | None, list[str]]:
    """Return the log density with charts for angles, heavy tails and walls, the start there, and the sites concerned.

    A coordinate is an angle if the density has a period of one turn along it, and is not constant. It has heavy tails
    if, from the middle of the prior, the density falls off like a power of the distance. It ends at a wall if the
    density is zero beyond one value, whatever the other coordinates are. A start is carried over by its draws.
    """
    if not density.batched:
        return density, start, []
    draws = prior_draws(density, PRIOR_DRAWS // 2, seed=derive(seed, "charts"))
    low, high = _walls(density, draws)
    walled = torch.isfinite(low) | torch.isfinite(high)
    if bool(walled.any()):
        charts: dict[str, dict[str, object]] = {}
        for latent in density.structure.latents:
            part = slice(latent.offset, latent.offset + latent.size)
            if bool(walled[part].any()):
                walls = Walls(*(torch.as_tensor(_full(latent, side[part], math.inf)) for side in (low, high)))
                charts[latent.name] = write_chart(walls)
        density, start = _charted(density, start, charts, seed=seed)
        draws = prior_draws(density, PRIOR_DRAWS // 2, seed=derive(seed, "charts"))
    angles, heavy = _angles(density, draws[:3]) & ~walled, _heavy(density, draws) & ~walled
    heavy &= ~angles
    if not bool((angles | heavy).any()):
        return density, start, _names(density)
    points = path_starts(draws)
    paths = pathfinder(density, points, spread_of(draws).expand(len(points), -1), seed=seed)
    best = int(paths.elbo.nan_to_num(nan=-torch.inf).argmax())
    loc, scale = _turned(density, paths.best.loc[best], angles), paths.best.scale()[best]
    charts = {}
    for latent in density.structure.latents:
        part = slice(latent.offset, latent.offset + latent.size)
        charts[latent.name] = _options(latent, angles[part], heavy[part], loc[part], scale[part])
    density, start = _charted(density, start, charts, seed=seed)
    return density, start, _names(density)


def _names(density: LogDensity) -> list[str]:
    return [latent.name for latent in density.structure.latents if latent.chart is not None]


@torch.no_grad()
def _charted(
    density: LogDensity, start: Start | None, charts: Mapping[str, Mapping[str, object]], *, seed: int
) -> tuple[LogDensity, Start | None]:
    """Return the density with charts of some sites, and the start in its coordinates."""
    options = density.structure.noncentered
    for name, chart in charts.items():
        if chart:
            kept = options.get(name, {})
            options[name] = {**({"noncentered": True} if kept is None else kept), **chart}
    found = density.elsewhere(options)
    found.evaluations += density.evaluations
    if start is None:
        return found, None
    with seeded(derive(seed, "carried over"), density.device):
        noise = torch.randn(2 * COMPARED_DRAWS, density.dim, dtype=density.dtype, device=density.device)
    z = torch.nan_to_num(found.unconstrain(density.constrain(start.map(noise))))
    return found, Start(start.name, z.median(0).values, spread_of(z))


def _options(latent: Latent, angles: Tensor, heavy: Tensor, loc: Tensor, scale: Tensor) -> dict[str, object]:
    """Return the chart of a site as plain numbers; a site is an angle as a whole, or not."""
    if bool(angles.any()):
        return {"turn_about": _full(latent, torch.remainder(loc + math.pi, math.tau) - math.pi, 0.0)}
    if not bool(heavy.any()):
        return {}
    return {"heavy_about": _full(latent, loc, 0.0), "heavy_scale": _full(latent, torch.where(heavy, scale, 0.0), 0.0)}


def _full(latent: Latent, values: Tensor, masked: float) -> object:
    """Return nested lists of a site's unconstrained shape; entries that are masked out get a number of their own."""
    if latent.free is not None:
        whole = torch.full((math.prod(latent.unconstrained_shape),), masked, dtype=values.dtype, device=values.device)
        values = whole.index_copy(0, latent.free.to(values.device), values)
    return values.reshape(latent.unconstrained_shape).tolist()


@torch.no_grad()
def _angles(density: LogDensity, draws: Tensor) -> Tensor:
    """Which coordinates (D,) are angles."""
    latents = density.structure.latents
    free = torch.cat([torch.full((latent.size,), _is_free(density, latent)) for latent in latents]).to(draws.device)
    found = torch.zeros_like(free)
    usable = draws[torch.isfinite(density(draws))]
    if not len(usable) or not bool(free.any()):
        return found
    directions = torch.eye(density.dim, dtype=draws.dtype, device=draws.device)[free]
    heights = density(usable)[:, None]
    tolerance = 100.0 * torch.finfo(draws.dtype).eps * (1.0 + heights.abs())

    def changes(size: float) -> Tensor:
        moved = usable[:, None] + size * directions
        return (density(moved.flatten(0, 1)).unflatten(0, moved.shape[:2]) - heights).abs()

    period = ((changes(math.tau) <= tolerance) & (changes(-math.tau) <= tolerance)).all(0)
    varies = (changes(0.3 * math.tau) > 10.0 * tolerance).any(0)
    found[free] = period & varies
    return found


@torch.no_grad()
def _walls(density: LogDensity, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return values of coordinates (D,) below and above which the density is zero; infinite ones where there is none.

    Only models that rule out some draws of their prior are looked at. A wall is where the density is zero a rounding
    error beyond it, and just before it not far below that of some point from where it was looked for. It is the same
    from all points: of few, none may be near all walls, as where a scale of locations is small.
    """
    none = torch.full_like(draws[0], torch.inf)
    if density.dim > FULL_HESSIAN_UP_TO or not bool((density(draws) == -torch.inf).any()):
        return -none, none
    points = possible_points(density, draws)
    if not len(points):
        return -none, none
    least = density(points)[:, None] - DENSITY_GAP_OF_NOTHING
    return _wall(density, points, -1.0, least), _wall(density, points, 1.0, least)


def _wall(density: LogDensity, points: Tensor, sign: float, least: Tensor) -> Tensor:
    """Return the wall (D,) along each coordinate in one direction from points (N, D); ``least`` (N, 1) are heights."""
    count, dim = points.shape
    lines = torch.diag(spread_of(points) if count > 1 else torch.ones_like(points[0]))

    def heights(steps: Tensor) -> Tensor:
        """Return the density (N, D) at one step (N, D) along each coordinate from each point."""
        return density((points[:, None] + sign * steps[..., None] * lines).flatten(0, 1)).unflatten(0, (count, dim))

    inside, outside = torch.zeros_like(points), torch.full_like(points, torch.inf)
    for number in range(24):  # from a hundredth of a spread on, twice as far each time
        step = torch.full_like(points, 0.01 * 2.0**number)
        impossible = heights(step) == -torch.inf
        open_ = torch.isinf(outside)
        inside = torch.where(open_ & ~impossible, step, inside)
        outside = torch.where(open_ & impossible, step, outside)
    found = torch.isfinite(outside)
    outside = torch.where(found, outside, 1.0)
    for _ in range(60):  # bisection
        middle = 0.5 * (inside + outside)
        impossible = heights(middle) == -torch.inf
        inside, outside = torch.where(impossible, inside, middle), torch.where(impossible, middle, outside)
    unit = lines.diagonal()
    places = (points + sign * inside * unit).double()
    rounding = 1e3 * torch.finfo(points.dtype).eps * (places.abs().amax(0) + unit)
    same = (places.amax(0) - places.amin(0)) <= rounding
    matters = (heights(inside) > least).any(0)
    wall = outside * unit * sign + points
    return torch.where(found.all(0) & same & matters, wall[0], sign * torch.inf)


@torch.no_grad()
def _turned(density: LogDensity, loc: Tensor, angles: Tensor) -> Tensor:
    """Return a place (D,) with each angle opposite to where the density is lowest along its turn through ``loc``.

    A path may end anywhere along an angle: a normal's ELBO grows with its spread, where the density is periodic.
    """
    if not bool(angles.any()):
        return loc
    turns = math.tau / 64 * torch.arange(64, dtype=loc.dtype, device=loc.device)
    directions = torch.eye(density.dim, dtype=loc.dtype, device=loc.device)[angles]
    points = loc + turns[:, None, None] * directions
    heights = density(points.flatten(0, 1)).unflatten(0, points.shape[:2]).nan_to_num(nan=-torch.inf)
    turned = loc.clone()
    turned[angles] += turns[heights.argmin(0)] + math.pi
    return turned


def _is_free(density: LogDensity, latent: Latent) -> bool:
    """Whether a site's values are any real numbers, in coordinates that are the values themselves."""
    support = messages(density.structure.trace)[latent.name]["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real and not latent.noncentered


@torch.no_grad()
def _heavy(density: LogDensity, draws: Tensor) -> Tensor:
    """Which coordinates (D,) have a tail, on either side, that falls off like a power."""
    middle, spread = draws.median(0).values, spread_of(draws)
    distances = torch.tensor([*FAR, *(-far for far in FAR)], dtype=draws.dtype, device=draws.device)
    lines = torch.diag(spread)
    points = middle + distances[:, None, None] * lines
    heights = density(points.flatten(0, 1)).double().unflatten(0, points.shape[:2]).reshape(2, len(FAR), -1)
    logs = torch.tensor(FAR, dtype=torch.float64, device=draws.device).log()
    powers = -heights.diff(dim=1) / logs.diff()[:, None]
    # a power is the same at all distances; an exponential or a normal tail has ever larger ones
    steady = (powers > 1.0) & (powers < HEAVY) & ((powers - powers.mean(1, keepdim=True)).abs() < 0.1 * powers.abs())
    return steady.all(1).any(0)
