"""The folded network as a plan: what `network.py` computes, in the calls that fuse it.

Feature maps are (N, H W, C). An instance norm is no pass of its own: the call before it leaves statistics, the one
behind it applies them. An Omni-block is five launches, the global branch beside the local one:

    depthwise 3x3, 5x5        | tokens gather from all positions, in parts
    their 1x1                 | parts merged, projected for the queries and for mix
    1x1 of both               | positions ask the learnable keys
    mix: u = mix2 o + mix (2 x + y) + what the tokens give
    x + out SiLU(IN(u))
"""

from dataclasses import asdict, dataclass, replace
from math import isqrt

from ..errors import ExportError
from .attention import attend_positions_call, attend_tokens_call, merge_tokens_call, part_shapes
from .conv import conv_call, max_pool_call, stem_call
from .depthwise import depthwise_call
from .expand import expand_call
from .fold import EPS, MIX_SCALE, Array, Block, Conv, Expand, Local, Network, Residual, Step, named_arrays
from .map import anomaly_map_call, cosine_call, tiles
from .means import means_call, parts_of, sums_call
from .mix import mix_call
from .norm import tile_rows
from .pack import KERNEL_ROW
from .plan import Buffer, Call, Launch, Plan
from .pointwise import pointwise_call
from .resize import resize_call
from .resize_tables import resample_tables
from .schedule import arrange, schedule


@dataclass(frozen=True)
class Map:
    """A feature map (N, height * width, channels) in a buffer; stats: of its instance norm, if one follows."""

    name: str
    height: int
    width: int
    channels: int
    stats: str | None = None

    @property
    def positions(self) -> int:
        return self.height * self.width


def build_plan(network: Network, batch: int, half: bool = True) -> Plan:
    """The plan for one batch size, in fp16 with fp32 where it matters, or wholly in fp32 (for tests).

    Input "pixels" (N, H, W, 3) uint8 RGB, to which the front brings a "frame" (rows, columns, 3) uint8 BGR;
    outputs "anomaly_map" (N, H, W), "peaks" (N, tiles), whose largest is the image score, and "embedding" (N, D),
    the teacher's features averaged over positions; fp32.
    Raises ExportError for a network the kernels do not cover.
    """
    check(network)
    r = Recorder(network, batch, half)
    r.buffers["pixels"] = Buffer((batch, network.height, network.width, 3), "uint8", "input", 0)
    teacher = backbone(r, network)
    embedding(r, teacher)
    student = decoder(r, network, neck(r, network, *teacher))
    anomaly_map(r, network, teacher, student)
    return r.plan(network.height, network.width, front(r, network.height, network.width))


def check(network: Network) -> None:
    for block in (block for stage in network.stages for block in stage):
        if block.step1 is not None and block.mix1 is None:
            raise ExportError(
                "the fused engine computes learnable queries, then learnable keys and values (attention 'q+kv'); "
                "export this network without --targets"
            )


class Recorder:
    """Collects buffers and calls; each scratch buffer is written once."""

    def __init__(self, network: Network, batch: int, half: bool) -> None:
        self.batch = batch
        self.dtype = "float16" if half else "float32"
        self.names = {id(array): name for name, array in named_arrays(network).items()}
        self.buffers: dict[str, Buffer] = {}
        self.calls: list[Call] = []

    def scratch(self, *shape: int, dtype: str = "", kind: str = "scratch", name: str = "") -> str:
        name = name or f"t{len(self.buffers)}"
        self.buffers[name] = Buffer((self.batch, *shape), dtype or self.dtype, kind, 0)
        return name

    def map(self, height: int, width: int, channels: int, normed: bool = False) -> Map:
        """A new feature map, with statistics if an instance norm follows."""
        stats = None
        if normed:
            tiles = -(-height * width // tile_rows(height * width))
            stats = self.scratch(tiles, 2, channels, dtype="float32")
        return Map(self.scratch(height * width, channels), height, width, channels, stats)

    def weight(self, recipe: str, *arrays: Array | None, shape: tuple[int, ...], dtype: str = "") -> str:
        """The buffer with these arrays, packed by a recipe of `pack.py`."""
        sources = tuple("" if array is None else self.names[id(array)] for array in arrays)
        name = f"{recipe}({', '.join(sources)})"
        self.buffers[name] = Buffer(shape, dtype or self.dtype, "weight", 0, (recipe, *sources))
        return name

    def bias(self, array: Array) -> str:
        return self.weight("same", array, shape=array.shape, dtype="float32")

    def matrix(self, array: Array) -> str:
        return self.weight("same", array, shape=array.shape)

    def call(self, call: Call) -> None:
        self.calls.append(call)

    def plan(self, height: int, width: int, front: Launch | None = None) -> Plan:
        before = {name for name, buffer in self.buffers.items() if buffer.kind in ("weight", "input")}
        return arrange(self.batch, height, width, self.buffers, schedule(self.calls, before), front)


def front(r: Recorder, height: int, width: int) -> Launch:
    r.buffers["frame"] = Buffer((0, 0, 3), "uint8", "frame", 0)
    tables = asdict(resample_tables(height, width, height, width))  # of any size of frame: shapes are the same
    for name, table in tables.items():
        r.buffers[name] = Buffer(table.shape, str(table.dtype), "table", 0)
    return Launch((resize_call("frame", *tables, "pixels", height, width),))


# ---- backbone and neck


def backbone(r: Recorder, network: Network) -> list[Map]:
    weights = network.backbone
    stem, height, width = weights.stem, network.height, network.width
    x = r.map(height // 2, width // 2, len(stem.bias))
    packed = r.weight("first_convolution", stem.weight, shape=(7 * KERNEL_ROW, x.channels))
    mean = r.weight("pixel_mean", weights.mean, shape=(4,), dtype="float32")
    r.call(stem_call("pixels", packed, r.bias(stem.bias), mean, x.name, height, width, x.channels, r.batch))
    y = r.map(height // 4, width // 4, x.channels)
    r.call(max_pool_call(x.name, y.name, x.height, x.width, x.channels, r.batch))
    features = []
    for layer in weights.layers:
        for block in layer:
            y = residual(r, block, y)
        features.append(y)
    return features


def residual(r: Recorder, block: Residual, x: Map) -> Map:
    y = x
    for conv in block.convs[:-1]:
        y = convolution(r, conv, y)
    if block.project is None:
        return convolution(r, block.convs[-1], y, add=x)
    return convolution(r, block.convs[-1], y, project=(block.project, x))


def convolution(
    r: Recorder,
    conv: Conv,
    x: Map,
    add: Map | None = None,
    project: tuple[Conv, Map] | None = None,
    relu_first: bool = False,
) -> Map:
    """relu(conv(x) + add + project), or relu(conv(x)) + add."""
    c_out, c_in, kernel, _ = conv.weight.shape
    y = r.map(-(-x.height // conv.stride), -(-x.width // conv.stride), c_out)
    weight = r.weight("convolution", conv.weight, shape=(kernel * kernel, c_in, c_out))
    bias, second = r.bias(conv.bias), {}
    if project is not None:
        side, x2 = project
        bias = r.weight("added", conv.bias, side.bias, shape=conv.bias.shape, dtype="float32")
        second = {
            "x2": x2.name,
            "weight2": r.weight("convolution", side.weight, shape=(1, x2.channels, c_out)),
            "height2": x2.height,
            "width2": x2.width,
            "c_in2": x2.channels,
            "stride2": side.stride,
        }
    r.call(
        conv_call(
            x.name,
            weight,
            bias,
            y.name,
            height=x.height,
            width=x.width,
            c_in=c_in,
            c_out=c_out,
            kernel=kernel,
            stride=conv.stride,
            batch=r.batch,
            add=add and add.name,
            relu_first=relu_first,
            **second,
        )
    )
    return y


def neck(r: Recorder, network: Network, f0: Map, f1: Map, f2: Map) -> Map:
    weights = network.neck
    a = convolution(r, weights.lateral1, f1, add=convolution(r, weights.down0, f0), relu_first=True)
    b = convolution(r, weights.lateral2, f2, add=convolution(r, weights.down1, a), relu_first=True)
    x = convolution(r, weights.fuse, b)
    for block in weights.blocks:
        x = residual(r, block, x)
    return x


# ---- decoder


def decoder(r: Recorder, network: Network, x: Map) -> list[Map]:
    students = []
    for index, stage in enumerate(network.stages):
        if index:
            x = expand(r, network.expands[index - 1], x)
        for block in stage:
            x = omni_block(r, block, x, network.tokens)
        students.append(x)
    return students[:0:-1]


def expand(r: Recorder, weights: Expand, x: Map) -> Map:
    y = r.map(2 * x.height, 2 * x.width, len(weights.gamma))
    arguments = r.matrix(weights.weight), r.bias(weights.gamma), r.bias(weights.beta), y.name
    r.call(expand_call(x.name, *arguments, x.height, x.width, y.channels, r.batch))
    return y


def omni_block(r: Recorder, weights: Block, x: Map, tokens: int) -> Map:
    y = None if weights.local is None else local(r, weights.local, x)
    u = r.map(x.height, x.width, x.channels, normed=True)
    if weights.step1 is None:
        pointwise(r, y, r.matrix(weights.mix), u, eps=EPS)
    else:
        given = token_part(r, weights, x, tokens)
        o = position_part(r, weights.step2, x, given, tokens)
        sizes = {"height": x.height, "width": x.width, "channels": x.channels, "grid": isqrt(tokens)}
        r.call(
            mix_call(
                o.name,
                x.name,
                y and y.name,
                y and y.stats,
                r.matrix(weights.mix2),
                r.matrix(weights.mix),
                given,
                u.name,
                u.stats,
                **sizes,
                tokens_stride=2 * x.channels,
                tokens_offset=x.channels,
                eps=EPS,
                batch=r.batch,
            )
        )
    out = r.map(x.height, x.width, x.channels)
    bias = r.bias(weights.out_bias)
    pointwise(r, u, r.matrix(weights.out), out, eps=EPS * MIX_SCALE**2, bias=bias, residual=x.name)
    return out


def local(r: Recorder, weights: Local, x: Map) -> Map:
    c = x.channels
    raw, z, y = (r.map(x.height, x.width, width, normed=True) for width in (2 * c, 2 * c, c))
    kernels = (
        r.weight("depthwise", weights.depthwise3, shape=(9, c)),
        r.weight("depthwise", weights.depthwise5, shape=(25, c)),
    )
    r.call(depthwise_call(x.name, *kernels, raw.name, raw.stats, x.height, x.width, c, r.batch))
    both = r.weight("stack", weights.pointwise3, weights.pointwise5, shape=(2 * c, c))
    pointwise(r, raw, both, z, eps=EPS, groups=2)
    pointwise(r, z, r.matrix(weights.mix), y, eps=EPS)
    return y


def token_part(r: Recorder, weights: Block, x: Map, tokens: int) -> str:
    """What the tokens give to the queries of the second step and, behind it, to mix: (N, T, 2C) fp32."""
    step, c = weights.step1, x.channels
    query = step.attend
    parts = tuple(r.scratch(*shape, dtype="float32") for shape in part_shapes(x.positions, c, tokens))
    arrays = (r.matrix(array) for array in (query.q, query.key, query.value))
    r.call(
        attend_tokens_call(x.name, *arrays, parts, positions=x.positions, channels=c, tokens=tokens, batch=r.batch)
    )
    pe = r.bias(query.pe)
    sizes = {"positions": x.positions, "channels": c, "tokens": tokens, "batch": r.batch}
    both = r.weight("stack", step.project, weights.mix1, shape=(2 * c, c))
    given = r.scratch(tokens, 2 * c, dtype="float32")
    if step.hidden is None:
        of_tokens = (query.constant, step.project, step.project_bias, weights.mix1)
        bias = r.weight("token_bias", *of_tokens, shape=(tokens, 2 * c), dtype="float32")
        r.call(merge_tokens_call(parts, both, pe, bias, given, c_out=2 * c, **sizes))
        return given
    hidden = Map(r.scratch(tokens, c), isqrt(tokens), isqrt(tokens), c)
    of_tokens = (query.constant, step.hidden, step.hidden_bias)
    bias = r.weight("token_bias", *of_tokens, shape=(tokens, c), dtype="float32")
    r.call(merge_tokens_call(parts, r.matrix(step.hidden), pe, bias, hidden.name, c_out=c, silu=True, **sizes))
    bias = r.weight("half_bias", step.project_bias, shape=(2 * c,), dtype="float32")
    pointwise(r, hidden, both, replace(hidden, name=given, channels=2 * c), bias=bias)
    return given


def position_part(r: Recorder, step: Step, x: Map, given: str, tokens: int) -> Map:
    keys, o = step.attend, r.map(x.height, x.width, x.channels)
    arrays = r.matrix(keys.query), given, r.matrix(keys.k), r.matrix(keys.v), o.name
    sizes = {"height": x.height, "width": x.width, "channels": x.channels, "n_tokens": tokens}
    r.call(attend_positions_call(x.name, *arrays, **sizes, tokens_stride=2 * x.channels, batch=r.batch))
    if step.hidden is None:
        return o
    hidden = r.map(x.height, x.width, x.channels)
    pointwise(r, o, r.matrix(step.hidden), hidden, bias=r.bias(step.hidden_bias), silu=True)
    return hidden


def pointwise(r: Recorder, x: Map, weight: str, y: Map, *, groups: int = 1, **options) -> None:
    """Normalises x if it has statistics, leaves y's if it shall have them."""
    sizes = {"positions": x.positions, "c_in": x.channels // groups, "c_out": y.channels, "groups": groups}
    r.call(
        pointwise_call(x.name, weight, y.name, x_stats=x.stats, y_stats=y.stats, **sizes, batch=r.batch, **options)
    )


# ---- what is made of the features


def embedding(r: Recorder, teacher: list[Map]) -> None:
    parts = [r.scratch(parts_of(t.positions), t.channels, dtype="float32") for t in teacher]
    for t, part in zip(teacher, parts, strict=True):
        r.call(sums_call(t.name, part, t.positions, t.channels, r.batch))
    sizes = [(t.positions, t.channels) for t in teacher]
    made = r.scratch(sum(t.channels for t in teacher), dtype="float32", kind="output", name="embedding")
    r.call(means_call(parts, made, sizes, r.batch))


def anomaly_map(r: Recorder, network: Network, teacher: list[Map], student: list[Map]) -> None:
    distances, resample = [], []
    for t, s, (rows, columns) in zip(teacher, student, network.resample, strict=True):
        distances.append(r.scratch(t.positions, dtype="float32"))
        resample.append((r.bias(rows), r.bias(columns)))
        r.call(cosine_call(t.name, s.name, distances[-1], t.positions, t.channels, r.batch))
    size = network.height, network.width
    made = r.scratch(*size, dtype="float32", kind="output", name="anomaly_map")
    peaks = r.scratch(tiles(*size), dtype="float32", kind="output", name="peaks")
    r.call(anomaly_map_call(distances, resample, made, peaks, *size, r.batch))
