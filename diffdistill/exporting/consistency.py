"""EDM-preconditioned networks as ConsistencyModelPipeline with CMStochasticIterativeScheduler."""

import numpy as np

from diffdistill.exporting.stock import Refusal, Request, Stock, require, square_size
from diffdistill.prediction import Prediction


def consistency(request: Request) -> Stock:
    """x0 by EDM's preconditioning, fresh noise between the steps (Song et al. 2023, algorithm 1).

    The scheduler's boundary condition is at its sigma_min, and so is the generator's: with 0 that is EDM's own
    preconditioning, and the re-noising x0 + sigma z. Its first sigma is sigma_max whatever the number of its training
    steps.
    """
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    denoiser = request.denoiser
    require(
        denoiser.source is Prediction.F and denoiser.scale_input and denoiser.clock == "edm",
        "its scheduler is EDM's preconditioning: prediction f, scale_input true, clock edm; the generator has "
        f"prediction {denoiser.source.value}, scale_input {str(denoiser.scale_input).lower()}, clock {denoiser.clock}",
    )
    require(
        request.rule in ("one", "renoise"),
        f"it adds fresh noise between its steps, so step_rule={request.generator.step_rule!r} with "
        f"{len(request.grid)} steps is not what it does; consistency models take step_rule renoise, and for a solver's "
        "steps use a grid of one time, or reflow a network with prediction velocity, whose Euler steps are stock",
    )
    square_size(request)
    if len(request.grid) == 1:
        table, call = {}, {"num_inference_steps": 1}
    else:
        rho, num_levels, indices = karras_levels(request.grid, denoiser.boundary)
        table = {"rho": rho, "num_train_timesteps": num_levels}
        call = {"num_inference_steps": None, "timesteps": indices}
    scheduler = CMStochasticIterativeScheduler(
        sigma_min=denoiser.boundary,
        sigma_max=request.grid[0],
        sigma_data=request.process.sigma_data,
        clip_denoised=False,
        **table,
    )
    notes = ["`latents`, if you give them, are standard normal; the pipeline scales them."]
    if request.network.config.in_channels != 3:
        notes = [
            "This class checks that `latents` have three channels, so it cannot be given any here; use `generator`."
        ]
    return Stock(
        ConsistencyModelPipeline(unet=request.network, scheduler=scheduler),
        call,
        takes_labels=request.num_classes > 0,
        notes=tuple(notes),
    )


def karras_levels(grid: tuple[float, ...], low: float = 0.0) -> tuple[float, int, list[int]]:
    """rho, a number of levels, and the indices, descending, at which the scheduler's sigmas are those of `grid`.

    With sigma_min = 0 the scheduler knows sigma_max (1 - n / m)^rho, with m + 1 levels and integers n. Two times need
    n / m = 1 / 2 and the right rho. For more, or with sigma_min = low > 0, where the roots of the sigmas are evenly
    spaced down to low's, every n of the second time gives a rho, and among these the one is taken at which the other
    indices come nearest to integers.

    Raises:
        Refusal: no table of at most a million levels meets the grid to the precision of float32.
    """
    drops = np.log(grid[0] / np.array(grid[1:]))
    if len(drops) == 1 and not low:
        return float(drops[0] / np.log(2)), 3, [1, 0]
    for m in (1_000, 10_000, 100_000, 1_000_000):
        share = np.arange(1, m) / m
        if low:
            depth = np.log(grid[0] / low)
            rho = _rho(drops[0], depth, share)
            fall = np.expm1(-depth / rho)  # of the roots, from the first level to the last
        else:
            rho, fall = -drops[0] / np.log1p(-share), -1.0
        places = m * np.expm1(-drops[:, None] / rho) / fall
        inside = places[-1] < m - 1
        if not inside.any():
            continue
        rho, places = rho[inside], places[:, inside]
        nearest = places.round()
        fall = fall[inside] if low else fall
        error = np.abs(rho * np.log1p((nearest - places) * fall / (m + places * fall))).max(axis=0)  # of log sigma
        error[(np.diff(nearest, axis=0) < 1).any(axis=0)] = np.inf
        best = int(error.argmin())
        if error[best] < 3e-8:  # half a unit in the last place of float32, in which the scheduler keeps sigma
            return float(rho[best]), m + 1, [int(n) for n in nearest[::-1, best]] + [0]
    raise Refusal(f"its scheduler's levels, integers in a Karras table, do not meet the grid {grid}; use fewer times")


def _rho(drop: float, depth: float, share: np.ndarray) -> np.ndarray:
    """The rho at which a level `drop` below the first in log sigma lies at each share of the way to one `depth` below.

    That is expm1(-drop / rho) / expm1(-depth / rho), which falls from 1 to drop / depth; where no rho between 1/10 and
    100 gives the share, one of these ends stands.
    """
    low, high = np.full(share.shape, 0.1), np.full(share.shape, 100.0)
    for _ in range(80):
        rho = np.sqrt(low * high)
        early = np.expm1(-drop / rho) / np.expm1(-depth / rho) > share
        low, high = np.where(early, rho, low), np.where(early, high, rho)
    return rho
