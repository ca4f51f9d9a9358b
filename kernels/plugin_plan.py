"""Parts of the network as plans of their own, for a TensorRT engine that leaves them to our kernels.

Each reads a feature map "x" (N, height * width, channels) and writes such maps. The kernels are nearly all those
of the whole network's plan.
"""

from collections.abc import Iterator
from dataclasses import replace

from .fold import Network
from .network_plan import Map, Recorder, check, decoder, omni_block
from .plan import Plan


def decoder_plan(network: Network, batch: int = 1, half: bool = True) -> Plan:
    """What the neck gives in, the student's feature maps out, the finest first as the teacher's.

    Raises ExportError for a network the kernels do not cover.
    """
    check(network)
    r = Recorder(network, batch, half)
    x = given(r, network, stage=0)
    return kept(r, decoder(r, network, x)).plan(x.height, x.width)


def block_plan(network: Network, stage: int, block: int, batch: int = 1, half: bool = True) -> Plan:
    """One Omni-block; stage 0 is the coarsest. Raises ExportError as `decoder_plan` does."""
    check(network)
    r = Recorder(network, batch, half)
    x = given(r, network, stage)
    made = omni_block(r, network.stages[stage][block], x, network.tokens)
    return kept(r, [made]).plan(x.height, x.width)


def plugin_plans(network: Network) -> Iterator[Plan]:
    """Of all parts that an engine may leave to the kernels. Raises ExportError as `decoder_plan` does."""
    yield decoder_plan(network)
    for stage, blocks in enumerate(network.stages):
        yield from (block_plan(network, stage, block) for block in range(len(blocks)))


def given(r: Recorder, network: Network, stage: int) -> Map:
    """The stage's input."""
    height, width = (size >> 5 - stage for size in (network.height, network.width))
    channels = len(network.stages[stage][0].out_bias)
    return Map(r.scratch(height * width, channels, kind="input", name="x"), height, width, channels)


def kept(r: Recorder, outputs: list[Map]) -> Recorder:
    """With these maps as outputs, in this order."""
    for made in outputs:
        r.buffers[made.name] = replace(r.buffers.pop(made.name), kind="output")
    return r
