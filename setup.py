from setuptools import setup

# `kernels` and `export` are top-level folders of the repository but sub-packages of the product:
# a bare top-level package named `kernels` exists on PyPI already.
setup(
    packages=[
        "omniad_edge",
        "omniad_edge.backbones",
        "omniad_edge.cameras",
        "omniad_edge.export",
        "omniad_edge.kernels",
        "omniad_edge.line",
        "omniad_edge.outputs",
    ],
    package_dir={
        "omniad_edge": "omniad_edge",
        "omniad_edge.kernels": "kernels",
        "omniad_edge.export": "export",
    },
    package_data={
        "omniad_edge": ["*.json"],
        "omniad_edge.backbones": ["*"],
        "omniad_edge.line": ["*.service"],
    },
)
