"""Names of the published Omni-AD state dict, so that weights can be exchanged with it."""

import re

# Our name -> the published name, applied in order.
RULES = (
    (r"^teacher\.", "net_t."),
    (r"^neck\.down0\.conv\.", "Neck.conv1."),
    (r"^neck\.down0\.norm\.", "Neck.bn1."),
    (r"^neck\.down1\.conv\.", "Neck.conv2."),
    (r"^neck\.down1\.norm\.", "Neck.bn2."),
    (r"^neck\.lateral1\.conv\.", "Neck.conv21."),
    (r"^neck\.lateral1\.norm\.", "Neck.bn21."),
    (r"^neck\.lateral2\.conv\.", "Neck.conv31."),
    (r"^neck\.lateral2\.norm\.", "Neck.bn31."),
    (r"^neck\.fuse\.conv\.", "Neck.convf."),
    (r"^neck\.fuse\.norm\.", "Neck.bnf."),
    (r"^neck\.blocks\.", "Neck.bn_layer."),
    (r"^decoder\.expands\.(\d+)\.", lambda m: f"net_s.layers_up.{int(m[1]) + 1}.upsample."),
    (r"^decoder\.stages\.(\d+)\.(\d+)\.", r"net_s.layers_up.\1.blocks.\2.blocks.0."),
    (r"\.global_branch\.step1\.tokens$", ".toProxy.learnable_q"),
    (r"\.global_branch\.step1\.pe$", ".toProxy.pe2"),
    (r"\.global_branch\.step1\.q\.", ".toProxy.q."),
    (r"\.global_branch\.step1\.kv\.", ".toProxy.kv_x."),
    (r"\.global_branch\.step1\.out\.", ".toProxy.ffn1."),
    (r"\.global_branch\.step2\.tokens$", ".toProxy.learnable_kv"),
    (r"\.global_branch\.step2\.pe$", ".toProxy.pe1"),
    (r"\.global_branch\.step2\.q\.", ".toProxy.q_2."),
    (r"\.global_branch\.step2\.kv\.", ".toProxy.kv_y."),
    (r"\.global_branch\.step2\.out\.", ".toProxy.ffn2."),
    (r"\.(ffn[12])\.0\.", r".\1.fc1."),
    (r"\.(ffn[12])\.2\.", r".\1.fc2."),
    (r"\.local_branch\.depthwise(\d)\.", r".conv\1\1.dconv.0."),
    (r"\.local_branch\.pointwise(\d)\.", r".conv\1\1.pconv.0."),
    (r"\.local_branch\.mix\.", ".mlp.0."),
    (r"(blocks\.0)\.mix\.", r"\1.l."),
    (r"(blocks\.0)\.out\.", r"\1.l2."),
)


def published_name(name: str) -> str:
    """The published state dict's name for one of our model's (order q+kv) parameters or buffers."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name
