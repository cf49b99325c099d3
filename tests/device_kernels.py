"""Compiles the GPU's kernels for devices that need not be there: run by test_optim_device.py in a process of its own."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autowu.optim.engines import triton as kernels
from autowu.optim.engines.gpu import _BLOCK, _WARPS, _WIDTH

FLOATS = ("coef", "decay", "eps", "max_norm", "cap", "lr", "momentum", "dampening", "new1", "beta2", "new2")
FLAGS = {"MOMENTUM": True, "FRESH": False, "NESTEROV": True, "MAXIMIZE": True}
# How many tensors a kernel over blocks reads, and how many it writes.
TRAFFIC = {"norms": (2, 0), "scale": (2, 1), "sgd": (3, 2), "moments": (4, 2), "lamb": (3, 1)}


def code(name, dtype, even, address, architecture):
    """What a kernel is for a device."""
    kernel = getattr(kernels, name)
    constants = {"BLOCK": _BLOCK, "WIDTH": _WIDTH, "EVEN": even, "ADDRESS": address, **FLAGS}
    types = {"table": "*i64", "owner": "*i32", "k": "i32", "blocks": "i32", "like": f"*{dtype}"}
    types |= {"sums": "*fp32", "stats": "*fp32", "corrections": "*fp64"} | dict.fromkeys(FLOATS, "fp32")
    if address:
        types |= {"lr": "*fp32"}
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, {arg: constants[arg] for arg in kernel.arg_names if arg in constants})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": _WARPS}).asm


def main():
    for name in (*TRAFFIC, "lars_ratios", "lamb_ratios"):
        for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
            for even in (False, True):
                asm = code(name, dtype, even, address=even, architecture=90 if even else 80)
                assert asm["cubin"]
                if even and name in TRAFFIC:  # 16 bytes at a time: nothing that a thread reads or writes of a tensor is split
                    each = _BLOCK // (32 * _WARPS) * size // 16
                    wide = tuple(asm["ptx"].count(f"{kind}.global.v4") for kind in ("ld", "st"))
                    assert wide == tuple(each * count for count in TRAFFIC[name]), (name, dtype, wide)


if __name__ == "__main__":
    main()
