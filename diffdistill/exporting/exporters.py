"""The table of exporters: each turns one kind of generator into a stock pipeline, or says why it cannot."""

from collections.abc import Callable
from dataclasses import dataclass

from diffdistill.exporting.consistency import consistency
from diffdistill.exporting.dit import dit_ddim, dit_flow, dit_renoise
from diffdistill.exporting.flow import flow, flow_with_classes
from diffdistill.exporting.stock import Refusal, Request, Stock
from diffdistill.exporting.variance_preserving import any_ddim, ddim, latent_consistency
from diffdistill.process import VE, VP, Process, Rectified


@dataclass(frozen=True)
class Exporter:
    """One way out.

    Args:
        family: the class of network that its pipeline holds.
        process: the process that its scheduler samples in.
        target: the pipeline and the scheduler, for messages.
        make: a Request of that family and process to a Stock, or a Refusal.
    """

    family: str
    process: type[Process]
    target: str
    make: Callable[[Request], Stock]


# Tried in this order: the pipeline that a user of diffusers would expect comes first.
EXPORTERS: tuple[Exporter, ...] = (
    Exporter("UNet2DModel", VE, "ConsistencyModelPipeline with CMStochasticIterativeScheduler", consistency),
    Exporter("UNet2DModel", VP, "DDIMPipeline with DDIMScheduler", ddim),
    Exporter("UNet2DModel", VP, "ConsistencyModelPipeline with LCMScheduler", latent_consistency),
    Exporter("UNet2DModel", VP, "ConsistencyModelPipeline with DPMSolverMultistepScheduler", any_ddim),
    Exporter("UNet2DModel", Rectified, "DDPMPipeline with FlowMatchEulerDiscreteScheduler", flow),
    Exporter("UNet2DModel", Rectified, "ConsistencyModelPipeline with DPMSolverMultistepScheduler", flow_with_classes),
    Exporter("DiTTransformer2DModel", VP, "DiTPipeline with DDIMScheduler", dit_ddim),
    Exporter("DiTTransformer2DModel", VP, "DiTPipeline with LCMScheduler", dit_renoise),
    Exporter("DiTTransformer2DModel", Rectified, "DiTPipeline with FlowMapEulerDiscreteScheduler", dit_flow),
)


def find(request: Request) -> Stock:
    """The first stock pipeline in the table that expresses the generator.

    Raises:
        Refusal: none does; the message has the reason of each.
    """
    rows = [row for row in EXPORTERS if row.family == request.family and type(request.process) is row.process]
    if not rows:
        known = sorted({f"{row.family} in {row.process.__name__}" for row in EXPORTERS})
        raise Refusal(
            f"no stock pipeline of diffusers samples with a {request.family} in {request.process}; known are "
            f"{', '.join(known)}. Train the generator in one of these"
        )
    targets: dict[str, list[str]] = {}
    for row in rows:
        try:
            return row.make(request)
        except Refusal as reason:
            targets.setdefault(str(reason), []).append(row.target)
    reasons = [f"{' and '.join(names)}: {reason}" for reason, names in targets.items()]
    raise Refusal("no stock pipeline of diffusers samples as this generator does. " + ". ".join(reasons))
