"""EDM-preconditioned networks as ConsistencyModelPipeline with CMStochasticIterativeScheduler."""

import numpy as np

from diffdistill.exporting.stock import Refusal, Request, Stock, require, square_size
from diffdistill.prediction import Prediction


def consistency(request: Request) -> Stock:
    """x0 by EDM's preconditioning, fresh noise between the steps (Song et al. 2023, algorithm 1).

    With sigma_min = 0 the scheduler's boundary condition is EDM's own preconditioning, its re-noising is
    x0 + sigma z, and its first sigma is sigma_max whatever the number of its training steps.
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
        f"{len(request.grid)} steps is not what it does; use step_rule renoise, or a grid of one time",
    )
    square_size(request)
    if len(request.grid) == 1:
        table, call = {}, {"num_inference_steps": 1}
    else:
        rho, num_levels, indices = karras_levels(request.grid)
        table = {"rho": rho, "num_train_timesteps": num_levels}
        call = {"num_inference_steps": None, "timesteps": indices}
    scheduler = CMStochasticIterativeScheduler(
        sigma_min=0.0,
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


def karras_levels(grid: tuple[float, ...]) -> tuple[float, int, list[int]]:
    """rho, a number of levels, and the indices, descending, at which the scheduler's sigmas are those of `grid`.

    With sigma_min = 0 the scheduler knows sigma_max (1 - n / m)^rho, with m + 1 levels and integers n. Two times need
    n / m = 1 / 2 and the right rho. For more, every n of the second time gives a rho, and among these the one is taken
    at which the other indices come nearest to integers.

    Raises:
        Refusal: no table of at most a million levels meets the grid to the precision of float32.
    """
    drops = np.log(grid[0] / np.array(grid[1:]))
    if len(drops) == 1:
        return float(drops[0] / np.log(2)), 3, [1, 0]
    for m in (1_000, 10_000, 100_000, 1_000_000):
        rho = -drops[0] / np.log1p(-np.arange(1, m) / m)
        places = m * -np.expm1(-drops[:, None] / rho)
        inside = places[-1] < m - 1
        if not inside.any():
            continue
        rho, places = rho[inside], places[:, inside]
        nearest = places.round()
        error = np.abs(rho * np.log1p((places - nearest) / (m - places))).max(axis=0)  # of log sigma
        error[(np.diff(nearest, axis=0) < 1).any(axis=0)] = np.inf
        best = int(error.argmin())
        if error[best] < 3e-8:  # half a unit in the last place of float32, in which the scheduler keeps sigma
            return float(rho[best]), m + 1, [int(n) for n in nearest[::-1, best]] + [0]
    raise Refusal(f"its scheduler's levels, integers in a Karras table, do not meet the grid {grid}; use fewer times")
