"""What a diffusers scheduler's config says about the network it was saved with."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
TABLES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def meaning(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """Process, prediction, clock and scale_input, as the plain data of a `denoiser.json`.

    Args:
        scheduler_config: the contents of a `scheduler_config.json`; what it leaves out has the default of its class.
    Raises:
        ValueError: the scheduler is unknown, or says something that a denoiser here cannot mean.
    """
    name = scheduler_config.get("_class_name")
    kind = getattr(importlib.import_module("diffusers"), str(name), None)
    if kind is None or not str(name).endswith("Scheduler"):
        raise ValueError(f"scheduler {name!r} is not one of diffusers; {WAY_OUT}")
    config = {"_class_name": name, **kind.from_config(scheduler_config).config}
    if name in READERS:
        return READERS[name](config)
    if config.get("prediction_type") == "flow_prediction":
        return _flow({**config, "shift": config.get("flow_shift", 1.0)})
    if "beta_schedule" in config:
        return _table(config)
    raise ValueError(f"no reading is known for {name}; known are {', '.join(READERS)} and those with betas. {WAY_OUT}")


WAY_OUT = "say what the network means in teacher.denoiser"


def _table(config: Mapping[str, Any]) -> dict[str, Any]:
    """A DDPM table; the network's time is the index of the table."""
    name, steps = config["_class_name"], config["num_train_timesteps"]
    prediction, schedule = config.get("prediction_type", "epsilon"), config["beta_schedule"]
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name} has prediction_type={prediction!r}; known are {', '.join(PREDICTIONS)}. {WAY_OUT}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"{name} has timestep_type={config['timestep_type']!r}; known is discrete. {WAY_OUT}")
    process: dict[str, Any] = {"name": "vp", "steps": steps}
    if config.get("trained_betas") is not None:
        process = {"name": "vp", "betas": [float(beta) for beta in config["trained_betas"]]}
    elif schedule not in TABLES:
        raise ValueError(f"{name} has beta_schedule={schedule!r}; known are {', '.join(TABLES)}. {WAY_OUT}")
    elif TABLES[schedule] == "cosine":
        process["table"] = "cosine"
    else:
        process |= {
            "table": TABLES[schedule],
            "beta_start": float(config["beta_start"]),
            "beta_end": float(config["beta_end"]),
        }
    if config.get("rescale_betas_zero_snr"):
        if prediction == "epsilon":
            raise ValueError(f"{name} ends at pure noise, where a network that predicts epsilon says nothing about x0")
        process["zero_snr"] = True
    return {"process": process, "prediction": PREDICTIONS[prediction], "clock": "steps", "scale_input": False}


def _flow(config: Mapping[str, Any]) -> dict[str, Any]:
    """A rectified flow; the network's time is t, times 1000. A shift that depends on the resolution is left out."""
    name = config["_class_name"]
    if config["num_train_timesteps"] != 1000:
        raise ValueError(
            f"{name} has num_train_timesteps={config['num_train_timesteps']}, and the clock here is t times 1000. "
            f"{WAY_OUT}"
        )
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} has invert_sigmas, that is a network whose time runs from noise to data. {WAY_OUT}")
    shift = 1.0 if config.get("use_dynamic_shifting") else float(config["shift"])
    return {
        "process": {"name": "rectified", "shift": shift},
        "prediction": "velocity",
        "clock": "thousand",
        "scale_input": False,
    }


def _edm(clock: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """EDM's preconditioning, with a network that is told 1/4 ln sigma in the unit of `clock`."""

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"{config['_class_name']} has prediction_type={config['prediction_type']!r}, which is EDM's output "
                f"with its sign changed; known is epsilon. {WAY_OUT}"
            )
        process = {"name": "ve", **{key: float(config[key]) for key in ("sigma_max", "rho", "sigma_data")}}
        if config["sigma_min"] > 0:  # 0, as in our exports, is no end for a grid; the default of the process stands in
            process["sigma_min"] = float(config["sigma_min"])
        return {"process": process, "prediction": "f", "clock": clock, "scale_input": True}

    return read


READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "CMStochasticIterativeScheduler": _edm("edm"),
    "EDMEulerScheduler": _edm("log_ratio"),
    "EDMDPMSolverMultistepScheduler": _edm("log_ratio"),
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
}
