"""Kernels over many tensors at once: what `gpu.py` launches.

A program of theirs has a block of BLOCK elements of one of k tensors of one dtype; `owner` (blocks,) tells of which. `table`
(3 + columns, k) has the size of each tensor, its first block, its number of blocks, and the addresses of it and of what goes with
it; `like` is any tensor of the dtype. With EVEN, all addresses are divisible by 16 and all sizes by 8, so that loads may be wide;
with ADDRESS, the LR is given by its address. Sums are made in an order that depends on nothing but sizes and EVEN.
"""
# mypy: ignore-errors
# A language of its own.

import triton
import triton.language as tl


@triton.jit
def _block(table, owner, k, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """The tensor of this program, the elements that it has, and which of them exist."""
    block = tl.program_id(0)
    tensor = tl.load(owner + block)
    size = tl.load(table + tensor)
    if EVEN:
        size = tl.multiple_of(size, 8)
    offsets = (block - tl.load(table + k + tensor)) * BLOCK + tl.arange(0, BLOCK)
    return tensor, offsets, offsets < size


@triton.jit
def _address(table, column: tl.constexpr, k, tensor, like, EVEN: tl.constexpr):
    """Where a tensor of a column begins."""
    address = tl.load(table + (3 + column) * k + tensor).to(like.dtype)
    return tl.multiple_of(address, 16) if EVEN else address


@triton.jit(do_not_specialize=["k", "blocks"])
def norms(table, owner, k, like, sums, blocks, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Sums of squares (2, blocks) of weights and gradients, columns 0 and 1."""
    tensor, offsets, exists = _block(table, owner, k, BLOCK, EVEN)
    weight = tl.load(_address(table, 0, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    grad = tl.load(_address(table, 1, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(weight * weight))
    tl.store(sums + blocks + tl.program_id(0), tl.sum(grad * grad))


@triton.jit
def _norms(table, k, sums, blocks, WIDTH: tl.constexpr):
    """The two norms of this program's tensor, of the sums of its blocks."""
    tensor = tl.program_id(0)
    first = tl.load(table + k + tensor)
    last = first + tl.load(table + 2 * k + tensor)
    totals = tl.zeros([WIDTH], tl.float64)
    others = tl.zeros([WIDTH], tl.float64)
    for start in range(first, last, WIDTH):
        at = start + tl.arange(0, WIDTH)
        totals += tl.load(sums + at, at < last, 0.0).to(tl.float64)
        others += tl.load(sums + blocks + at, at < last, 0.0).to(tl.float64)
    return tl.sqrt(tl.sum(totals)).to(tl.float32), tl.sqrt(tl.sum(others)).to(tl.float32)


@triton.jit
def _adapts(weight, other):
    """Whether there is a ratio of two norms; without one it counts as 1."""
    return (weight > 0) & (other > 0)


@triton.jit
def _store(stats, k, weight, other, ratio):
    tensor = tl.program_id(0)
    tl.store(stats + tensor, weight)
    tl.store(stats + k + tensor, other)
    tl.store(stats + 2 * k + tensor, tl.where(_adapts(weight, other), ratio, 1.0))


@triton.jit(do_not_specialize=["k", "blocks"])
def lars_ratios(table, k, sums, blocks, stats, coef, decay, eps, max_norm, WIDTH: tl.constexpr):
    """Weight norm, gradient norm and trust ratio of LARS (3, k), a tensor each program."""
    weight, grad = _norms(table, k, sums, blocks, WIDTH)
    w, g = tl.minimum(weight, max_norm), tl.minimum(grad, max_norm)
    _store(stats, k, weight, grad, coef * w / tl.where(_adapts(weight, grad), g + decay * w + eps, 1.0))


@triton.jit(do_not_specialize=["k", "blocks"])
def lamb_ratios(table, k, sums, blocks, stats, cap, WIDTH: tl.constexpr):
    """Weight norm, update norm and trust ratio of LAMB (3, k), a tensor each program."""
    weight, update = _norms(table, k, sums, blocks, WIDTH)
    ratio = weight / tl.where(_adapts(weight, update), update, 1.0)
    _store(stats, k, weight, update, tl.where(ratio > cap, cap, ratio))


@triton.jit(do_not_specialize=["k"])
def scale(table, owner, k, like, stats, decay, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Gradients become what LARS gives to an optimizer; the decay comes with its sign."""
    tensor, offsets, exists = _block(table, owner, k, BLOCK, EVEN)
    grads = _address(table, 1, k, tensor, like, EVEN) + offsets
    weight = tl.load(_address(table, 0, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    grad = tl.load(grads, exists, 0.0).to(tl.float32)
    grad = tl.load(stats + 2 * k + tensor) * (grad + decay * weight)
    tl.store(grads, grad.to(like.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["k"])
def sgd(
    table,
    owner,
    k,
    like,
    stats,
    lr,
    decay,
    momentum,
    dampening,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    ADDRESS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FRESH: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """A step of torch.optim.SGD on scaled gradients. The buffers are column 2; fresh ones hold nothing yet."""
    tensor, offsets, exists = _block(table, owner, k, BLOCK, EVEN)
    weights = _address(table, 0, k, tensor, like, EVEN) + offsets
    weight = tl.load(weights, exists, 0.0).to(tl.float32)
    grad = tl.load(_address(table, 1, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    grad = tl.load(stats + 2 * k + tensor) * (grad + decay * weight)
    if MOMENTUM:
        buffers = _address(table, 2, k, tensor, like, EVEN) + offsets
        buffer = grad
        if not FRESH:
            buffer = momentum * tl.load(buffers, exists, 0.0).to(tl.float32) + (1 - dampening) * grad
        tl.store(buffers, buffer.to(like.dtype.element_ty), exists)
        grad = grad + momentum * buffer if NESTEROV else buffer
    rate = tl.load(lr).to(tl.float32) if ADDRESS else lr
    tl.store(weights, (weight - rate * grad).to(like.dtype.element_ty), exists)


@triton.jit
def _update(weight, first, second, corrections, k, tensor, eps, decay):
    """LAMB's update; `corrections` (2, k) are what is left to the moments by their start from 0."""
    correction1 = tl.load(corrections + tensor).to(tl.float32)
    correction2 = tl.load(corrections + k + tensor).to(tl.float32)
    return first / correction1 / (tl.sqrt(second / correction2) + eps) + decay * weight


@triton.jit(do_not_specialize=["k", "blocks"])
def moments(
    table,
    owner,
    k,
    like,
    sums,
    blocks,
    corrections,
    new1,
    beta2,
    new2,
    eps,
    decay,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Advance both moments, columns 2 and 3; sums of squares (2, blocks) of weights and of LAMB's updates."""
    tensor, offsets, exists = _block(table, owner, k, BLOCK, EVEN)
    weight = tl.load(_address(table, 0, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    grad = tl.load(_address(table, 1, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    firsts = _address(table, 2, k, tensor, like, EVEN) + offsets
    seconds = _address(table, 3, k, tensor, like, EVEN) + offsets
    first = tl.load(firsts, exists, 0.0).to(tl.float32)
    second = tl.load(seconds, exists, 0.0).to(tl.float32)
    # Rounded as they are stored, for the second pass makes the same update of them.
    first = (first + new1 * (grad - first)).to(like.dtype.element_ty)
    second = (beta2 * second + new2 * grad * grad).to(like.dtype.element_ty)
    tl.store(firsts, first, exists)
    tl.store(seconds, second, exists)
    update = _update(weight, first.to(tl.float32), second.to(tl.float32), corrections, k, tensor, eps, decay)
    tl.store(sums + tl.program_id(0), tl.sum(weight * weight))
    tl.store(sums + blocks + tl.program_id(0), tl.sum(tl.where(exists, update * update, 0.0)))


@triton.jit(do_not_specialize=["k"])
def lamb(
    table,
    owner,
    k,
    like,
    stats,
    corrections,
    lr,
    eps,
    decay,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    ADDRESS: tl.constexpr,
):
    """Subtract the update, scaled."""
    tensor, offsets, exists = _block(table, owner, k, BLOCK, EVEN)
    weights = _address(table, 0, k, tensor, like, EVEN) + offsets
    weight = tl.load(weights, exists, 0.0).to(tl.float32)
    first = tl.load(_address(table, 2, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    second = tl.load(_address(table, 3, k, tensor, like, EVEN) + offsets, exists, 0.0).to(tl.float32)
    update = _update(weight, first, second, corrections, k, tensor, eps, decay)
    ratio = tl.load(stats + 2 * k + tensor)
    rate = tl.load(lr).to(tl.float32) if ADDRESS else lr
    tl.store(weights, (weight - rate * ratio * update).to(like.dtype.element_ty), exists)
