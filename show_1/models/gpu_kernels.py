"""Triton kernels: group norm in channels last, sums with a bias, convolution over frames, gated GELU, attention over
short sequences.

Triton comes with CUDA builds of PyTorch; elsewhere this module cannot be imported. What varies with the number of
pixels is no constant of a kernel, so that few are compiled.
"""

import torch
import triton
import triton.language as tl

TILE = 4096  # elements that a program holds at a time
PROGRAMS = 1024  # enough to fill the largest GPUs


def group_norm(
    x: torch.Tensor,
    dtype: torch.dtype,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: str | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return activation(norm(x + added)·(1 + scale) + shift), computed in float32, in that type and the layout of `x`.

    `x` is (batch, channels, …) and lies in memory as (batch, …, channels); `scale` and `shift` are (batch, channels),
    `added` too or (channels,). Three kernels run: statistics, combine, apply.
    """
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    columns = min(128, max(32, channels & -channels))  # the power of two in 160, 320, …: no column idle
    rows = TILE // columns
    blocks = triton.cdiv(channels, columns)

    tiles = triton.cdiv(pixels, rows)
    chunk = rows * triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, batch * blocks)))
    chunks = triton.cdiv(pixels, chunk)
    means, squares = torch.empty(2, batch, chunks, channels, dtype=torch.float32, device=x.device)
    factors, offsets = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x, dtype=dtype)
    scale, shift, added = (None if each is None else each.expand(batch, channels) for each in (scale, shift, added))
    strides = [stride for each in (scale, shift, added) for stride in ((0, 0) if each is None else each.stride())]

    with torch.cuda.device_of(x):
        _statistics[chunks, blocks, batch](x, means, squares, pixels, channels, chunk, rows, columns, num_warps=4)
        _combine[groups, batch](
            *(means, squares, weight, bias, scale, shift, added, factors, offsets),
            *(pixels, channels, chunk, chunks, channels // groups, *strides, eps),
            num_warps=4,
        )
        _apply[tiles, blocks, batch](x, factors, offsets, y, pixels, channels, activation, rows, columns, num_warps=4)
    return y


def add(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return x + y + bias, computed in float32, in the layout of both and the wider of their types.

    `x` and `y` are (batch, channels, …) and lie in memory as (batch, …, channels); `bias` is (channels,).
    """
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    with torch.cuda.device_of(x):
        _add[(triton.cdiv(x.numel(), TILE),)](x, y, bias, total, x.numel(), x.shape[1], TILE, num_warps=4)
    return total


def frame_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what a convolution over three frames makes of `x`, without a bias: (batch, out_channels, frames, pixels).

    `x` is (batch, channels, frames, pixels) and lies in memory as (batch, frames, pixels, channels), as does what
    comes back; `weight` is (out_channels, channels, 3). Channels are 32, 64 or 128; sums are in float32.
    """
    batch, channels, frames, pixels = x.shape
    out = len(weight)
    rows, depth = 128, min(channels, 64)
    y = x.new_empty(batch, frames, pixels, out).permute(0, 3, 1, 2)
    weight = weight.permute(2, 0, 1).contiguous()
    with torch.cuda.device_of(x):
        _frame_conv[triton.cdiv(pixels, rows), batch * frames](
            *(x, weight, y, pixels, frames, channels, out, rows, depth), num_warps=8, num_stages=3
        )
    return y


def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return the first half of the last dimension times the GELU of the second, computed in float32, in its type."""
    features = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _gated_gelu[(triton.cdiv(y.numel(), TILE),)](x, y, y.numel(), features, TILE, num_warps=4)
    return y


def short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Return softmax(q·kᵀ/√features)·v of each head, computed in float32, in the type and shape of `q`.

    All are (sequences, frames, heads·features), of 16 frames at most, with the last dimension contiguous.
    """
    sequences, frames, channels = q.shape
    features = channels // heads
    tile_frames, tile_features = triton.next_power_of_2(frames), triton.next_power_of_2(features)
    rows = TILE // (tile_frames * tile_features)
    strides = (stride for x in (q, k, v) for stride in x.stride()[:2])
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _short_attention[(triton.cdiv(sequences * heads, rows),)](
            *(q, k, v, y, sequences * heads, frames, heads, *strides, features**-0.5),
            *(features, rows, tile_frames, tile_features),
            num_warps=4,
        )
    return y


@triton.jit(do_not_specialize=["pixels", "chunk"])
def _statistics(x, means, squares, pixels, channels, chunk, rows: tl.constexpr, columns: tl.constexpr):
    """Write each channel's mean over a chunk of pixels, and its sum of squares about that mean."""
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * chunk
    stop = tl.minimum(start + chunk, pixels)
    row = tl.arange(0, rows)[:, None]
    column = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
    inside = column < channels
    at = x + (batch * pixels + start) * channels + row * channels + column

    # The first tile's mean is near the chunk's, and sums about it lose nothing to rounding where x is far from 0.
    first = tl.load(at, mask=inside & (start + row < stop), other=0).to(tl.float32)
    near = tl.sum(first, 0, keep_dims=True) / tl.minimum(rows, stop - start)
    total = tl.zeros((rows, columns), tl.float32)
    square = tl.zeros((rows, columns), tl.float32)
    for pixel in range(start, stop, rows):
        present = inside & (pixel + row < stop)
        difference = tl.where(present, tl.load(at, mask=present, other=0).to(tl.float32) - near, 0)
        total += difference
        square += difference * difference
        at += rows * channels
    mean = tl.sum(total, 0, keep_dims=True) / (stop - start)
    to = (batch * tl.num_programs(0) + tl.program_id(0)) * channels + column
    tl.store(means + to, near + mean, mask=inside)
    tl.store(squares + to, tl.sum(square, 0, keep_dims=True) - mean * mean * (stop - start), mask=inside)


@triton.jit(do_not_specialize=["pixels", "channels", "chunk", "chunks", "size", *(f"stride{i}" for i in range(6))])
def _combine(
    means, squares, weight, bias, scale, shift, added, factors, offsets,
    pixels, channels, chunk, chunks, size, stride0, stride1, stride2, stride3, stride4, stride5, eps,
):  # fmt: skip
    """Write a group's factors and offsets, one a channel, from the statistics of its `size` channels' chunks.

    What is `added` to a channel moves its means and changes nothing about them.
    """
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * size
    lane = tl.arange(0, 1024)
    means += batch * chunks * channels + first
    squares += batch * chunks * channels + first

    total = tl.zeros((1024,), tl.float32)
    for start in range(0, chunks * size, 1024):
        part = (start + lane) // size
        count = tl.minimum(chunk, pixels - part * chunk).to(tl.float32)
        at = part * channels + (start + lane) % size
        here = tl.load(means + at, mask=part < chunks, other=0)
        if added is not None:
            channel = first + (start + lane) % size
            here += tl.load(added + batch * stride4 + channel * stride5, mask=part < chunks, other=0).to(tl.float32)
        total += tl.where(part < chunks, here * count, 0)
    mean = tl.sum(total) / pixels / size

    total = tl.zeros((1024,), tl.float32)
    for start in range(0, chunks * size, 1024):
        part = (start + lane) // size
        count = tl.minimum(chunk, pixels - part * chunk).to(tl.float32)
        at = part * channels + (start + lane) % size
        here = tl.load(means + at, mask=part < chunks, other=0)
        if added is not None:
            channel = first + (start + lane) % size
            here += tl.load(added + batch * stride4 + channel * stride5, mask=part < chunks, other=0).to(tl.float32)
        spread = tl.load(squares + at, mask=part < chunks, other=0) + (here - mean) * (here - mean) * count
        total += tl.where(part < chunks, spread, 0)
    variance = tl.maximum(tl.sum(total) / pixels / size, 0)  # rounding must not make it negative
    inverse = 1 / tl.sqrt(variance + eps)

    for start in range(0, size, 1024):
        channel = first + start + lane
        inside = start + lane < size
        factor = tl.load(weight + channel, mask=inside).to(tl.float32) * inverse
        middle = mean
        if added is not None:
            middle = mean - tl.load(added + batch * stride4 + channel * stride5, mask=inside).to(tl.float32)
        offset = tl.load(bias + channel, mask=inside).to(tl.float32) - middle * factor
        if scale is not None:
            more = 1 + tl.load(scale + batch * stride0 + channel * stride1, mask=inside).to(tl.float32)
            plus = tl.load(shift + batch * stride2 + channel * stride3, mask=inside).to(tl.float32)
            factor, offset = factor * more, offset * more + plus
        tl.store(factors + batch * channels + channel, factor, mask=inside)
        tl.store(offsets + batch * channels + channel, offset, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _apply(
    x, factors, offsets, y, pixels, channels, activation: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):
    """Write activation(x·factor + offset) for a tile of pixels and channels."""
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * rows
    row = tl.arange(0, rows)[:, None]
    column = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
    inside = column < channels
    factor = tl.load(factors + batch * channels + column, mask=inside)
    offset = tl.load(offsets + batch * channels + column, mask=inside)
    tile = (batch * pixels + start) * channels + row * channels + column
    present = inside & (start + row < pixels)
    value = tl.load(x + tile, mask=present).to(tl.float32) * factor + offset
    if activation == "gelu":
        value = _gelu(value)
    elif activation == "silu":
        value = value / (1 + tl.exp(-value))
    tl.store(y + tile, value.to(y.dtype.element_ty), mask=present)


@triton.jit
def _gelu(value):
    return 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))


@triton.jit(do_not_specialize=["size"])
def _add(x, y, bias, to, size, channels, tile: tl.constexpr):
    """Write x + y + bias for a tile of elements, channels last."""
    start = tl.program_id(0).to(tl.int64) * tile
    lane = tl.arange(0, tile)
    inside = start + lane < size
    value = tl.load(x + start + lane, mask=inside).to(tl.float32) + tl.load(y + start + lane, mask=inside)
    value += tl.load(bias + ((start % channels).to(tl.int32) + lane) % channels)
    tl.store(to + start + lane, value.to(to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "frames"])
def _frame_conv(
    x, weight, y, pixels, frames,
    channels: tl.constexpr, out: tl.constexpr, rows: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Write a frame's convolution with its neighbours for a tile of pixels and all channels.

    `weight` is (3, out, channels). Beyond the first and the last frame there is nothing to add.
    """
    number = tl.program_id(1)  # of the frame, of all in the batch
    frame = number % frames
    row = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    column = tl.arange(0, out)
    inner = tl.arange(0, depth)
    steps: tl.constexpr = channels // depth
    begin = tl.where(frame == 0, steps, 0)
    end = tl.where(frame == frames - 1, 2 * steps, 3 * steps)
    total = tl.zeros((rows, out), tl.float32)
    for step in range(begin, end):
        tap = step // steps
        channel = step % steps * depth + inner
        other = (number + tap - 1).to(tl.int64) * pixels
        seen = tl.load(x + (other + row) * channels + channel[None, :], mask=row < pixels, other=0)
        part = tl.load(weight + (tap * out + column[None, :]) * channels + channel[:, None])
        total = tl.dot(seen, part, total)
    at = (number.to(tl.int64) * pixels + row) * out + column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=row < pixels)


@triton.jit(do_not_specialize=["size"])
def _gated_gelu(x, y, size, features, tile: tl.constexpr):
    """Write a tile of the elements of value · GELU(gate), which lie in rows of 2·features."""
    start = tl.program_id(0).to(tl.int64) * tile
    lane = tl.arange(0, tile)
    inside = start + lane < size
    column = (start % features).to(tl.int32) + lane
    at = x + (start // features + column // features) * 2 * features + column % features
    value = tl.load(at, mask=inside, other=0).to(tl.float32)
    gate = tl.load(at + features, mask=inside, other=0).to(tl.float32)
    tl.store(y + start + lane, (value * _gelu(gate)).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "frames", "heads"])
def _short_attention(
    q, k, v, y, rows, frames, heads, q_sequence, q_frame, k_sequence, k_frame, v_sequence, v_frame, scale,
    features: tl.constexpr, tile_rows: tl.constexpr, tile_frames: tl.constexpr, tile_features: tl.constexpr,
):  # fmt: skip
    """Write the attention of some rows, a row being one head of one sequence: head by head, then sequence by sequence.

    The keys and values of all frames are held, (rows, frames, features); the queries come frame by frame. Were frames
    the first dimension, Triton would spread them over threads, and sums over them would go through shared memory.
    """
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)[:, None, None]
    frame = tl.arange(0, tile_frames)[None, :, None]
    feature = tl.arange(0, tile_features)[None, None, :]
    inside = (row < rows) & (feature < features)
    present = inside & (frame < frames)
    sequence = (row // heads).to(tl.int64)
    column = row % heads * features + feature

    far = frame.to(tl.int64)
    key = tl.load(k + sequence * k_sequence + far * k_frame + column, mask=present, other=0).to(tl.float32)
    value = tl.load(v + sequence * v_sequence + far * v_frame + column, mask=present, other=0).to(tl.float32)
    at = q + sequence * q_sequence + column
    to = y + sequence * frames * heads * features + column
    for _ in range(frames):
        query = tl.load(at, mask=inside, other=0).to(tl.float32) * scale
        score = tl.where(frame < frames, tl.sum(query * key, 2, keep_dims=True), float("-inf"))
        weight = tl.exp(score - tl.max(score, 1, keep_dims=True))
        result = tl.sum(weight * value, 1, keep_dims=True) / tl.sum(weight, 1, keep_dims=True)
        tl.store(to, result.to(y.dtype.element_ty), mask=inside)
        at += q_frame
        to += heads * features
