"""Device code of the FP8 form (sm_90), of which fp8.py says what it covers, in Gluon.

Roles, work items, mail and masks are those of device.py; what differs is the arithmetic.

- K and V come as e4m3 that `quantise` wrote (triton_e4m3.py), a scale for every 128 keys each, V transposed: FP8 tensor
  cores read operands from shared memory along the dimension of the sum only.
- A consumer turns its 64 queries into e4m3 itself, a scale a row, and keeps them in registers as the first operand.
- P, too, goes from the accumulator into the first operand's registers. A thread holds keys 2 c, 2 c + 1, 2 c + 8 and
  2 c + 9 of each 16 (c is its place among four), while four e4m3 of one register are neighbours 4 c to 4 c + 3. So V is
  written with the keys of each 16 in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15, and no thread asks another for
  anything. Sums over keys have no order, so nothing else knows of it. P crosses a step as words of four: as single
  e4m3 the compiler would carry a register for each.
- A block's scale of V goes into the exponent of P: P = 2^(logit + log2(scale) + 6 - m), where m is the maximum of the
  same over the first step; the sum of the row takes it out again, a factor a step.
- As device.py's MODE says, m stays where it is, but here only as long as P fits e4m3, which ends at 448. The sums that
  a step makes anyway tell: 16 weights that sum up to less are each less. Where they do not, m grows, and P and the
  accumulator shrink. A row whose P was beyond float32 is NaN, and its item is done again.
- FP8 tensor cores cut the accumulator to 13 bits behind the point with every 32 keys. Left to them, a sum over 128K
  keys loses half of a mean value (measured; FlashAttention-3 does). So every FLUSH steps it goes into a float32 sum in
  shared memory, where the output is staged later.
- What a head's keys have in common is taken off them first (SageAttention, arXiv 2410.02367): all logits of a row lose
  the same, and the softmax nothing. Keys of Qwen2.5's first layer are nearly all of that; the rest was rounded away.
- What its values have in common is taken off them too, and comes back to every output: weights sum to 1, less the
  sink's. So neither rounding nor the accumulator loses any of it.
"""

# See device.py.
# ruff: noqa: E741, RET505, RUF005, SIM102
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsekit.kernels.attend.hopper.device import (
    AGAIN,
    COUNT,
    EMPTY,
    FIXED,
    FLOOR,
    ITEM,
    LN2,
    LOG2E,
    MAIL,
    NARROW,
    NUMBER,
    REINTERPRET,
    SLOT,
    _begin,
    _by_eight,
    _close,
    _item,
    _load_queries,
    _mark,
    _marked,
    _mask,
    _next,
    _receive,
    _receive_item,
    _receive_rule,
    _rescale,
    _row_max,
    _send,
    _send_item,
    _send_rule,
    _step,
    _store,
    _store_part,
    _tma_load,
    _with_sink,
)
from sparsekit.kernels.attend.triton_e4m3 import BLOCK, LARGEST, SMALLEST

__all__ = ["attention"]

HEADROOM = gl.constexpr(6.0)  # log2 of P at m
LAG = gl.constexpr(0.8)  # how far the running maximum may grow before the accumulator is rescaled
FLUSH = gl.constexpr(16)  # steps
FEW = gl.constexpr(32)  # keys of a step for sinks: one FP8 product is 32 deep

# Four at once, and as one register.
TO_E4M3 = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
    "mov.b32 $0, {a, b}; }"
)


@gluon.jit
def _produce(
    d_q, d_k, d_v, d_few_k, d_few_v, qs, ks, vs, scales, taken, q_full, q_free, full, free, mail, m_full, m_free,
    p_items, p_entries, p_counters, p_marks, p_rule, p_scales, p_common, mode, items, heads, group, blocks, rule_sample,
    rule_head, heads_per_plan, LISTED: gl.constexpr, RULE: gl.constexpr, SPLIT: gl.constexpr, NARROW_FORM: gl.constexpr,
    SHIFT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    Q_STAGES: gl.constexpr = q_full.shape[0]
    BN: gl.constexpr = d_k.block_type.shape[2]
    D: gl.constexpr = d_q.block_type.shape[3]
    slot = 0
    phase = 0
    q_slot = 0
    q_phase = 0
    m_slot = 0
    m_phase = 0
    t, items = _begin(p_counters, p_marks, mode, items)
    row, sample_head, start, count, kv_start, kind = _item(p_items, t, items)
    while t < items:
        number = t
        p_item = p_items + t * ITEM
        t = gl.atomic_add(p_counters, 1) + gl.num_programs(0)
        if count > 0:
            sample = sample_head // heads
            head = sample_head - sample * heads
            key_head = head // group
            # Query heads of a sample lie as its key heads do, `group` to each.
            p_my_scales = p_scales + (sample_head // group) * blocks * 2
            _load_queries(d_q, sample, head, row, q_slot, q_phase, qs, q_full, q_free)
            q_slot, q_phase = _next(q_slot, q_phase, Q_STAGES)
            e = _step(p_entries, start, 0, count, kind, BN, 1, LISTED, False, 1)
            e1 = _step(p_entries, start, 1, count, kind, BN, 1, LISTED, False, 1)
            k_scale, v_log = _scales_of(p_my_scales, e)
            mbarrier.wait(m_free.index(m_slot), m_phase ^ 1)
            _send_item(mail, m_slot, row, sample_head, start, count, kv_start, kind, e, e1)
            _send(mail, m_slot * MAIL + NUMBER, number)
            if RULE:
                _send_rule(mail, m_slot, kind, p_rule + sample * rule_sample + head // heads_per_plan * rule_head)
            if SPLIT:
                _send(mail, m_slot * MAIL + SLOT, gl.load(p_item + SLOT))
            d = gl.arange(0, D, gl.BlockedLayout([D // 32], [32], [1], [0]))
            p_mine = p_common + sample_head // group * 2 * D + d
            if SHIFT:
                taken.index(2 * m_slot).store(gl.load(p_mine))
            taken.index(2 * m_slot + 1).store(gl.load(p_mine + D))
            mbarrier.arrive(m_full.index(m_slot), count=1)
            m_slot, m_phase = _next(m_slot, m_phase, 2)
            if NARROW_FORM:
                if (kind & NARROW) != 0:
                    few_scale, few_log = _scales_of(p_my_scales, 0)
                    mbarrier.wait(free.index(slot), phase ^ 1)
                    _put(scales, slot * 2, few_scale)
                    _put(scales, slot * 2 + 1, few_log)
                    mbarrier.expect(full.index(slot), d_few_k.block_type.nbytes + d_few_v.block_type.nbytes)
                    few_k = _few_keys(ks.index(slot), d_few_k)
                    _tma_load(d_few_k, [sample, key_head, 0, 0], full.index(slot), few_k)
                    few_v = _few_values(vs.index(slot), d_few_v)
                    _tma_load(d_few_v, [sample, key_head, 0, 0], full.index(slot), few_v)
                    slot, phase = _next(slot, phase, STAGES)
            _load_step(d_k, d_v, sample, key_head, e, k_scale, v_log, slot, phase, ks, vs, scales, full, free)
            slot, phase = _next(slot, phase, STAGES)
            # By now the counter has answered. The next item is read here, so that its Q and K need not wait for it.
            if mode == AGAIN:
                t = _marked(p_marks, p_counters, t, items)
            row, sample_head, start1, count1, kv_start, kind1 = _item(p_items, t, items)
            k_scale, v_log = _scales_of(p_my_scales, e1)
            for i in range(1, count):
                now = e1
                now_scale = k_scale
                now_log = v_log
                e1 = _step(p_entries, start, i + 1, count, kind, BN, 1, LISTED, False, 1)
                k_scale, v_log = _scales_of(p_my_scales, e1)
                _load_step(d_k, d_v, sample, key_head, now, now_scale, now_log, slot, phase, ks, vs, scales, full, free)
                slot, phase = _next(slot, phase, STAGES)
            start = start1
            count = count1
            kind = kind1
        else:
            t = items + t * 0  # items without steps are the last ones
    _close(mail, m_slot, m_phase, m_full, m_free, p_counters, p_marks, mode)


@gluon.jit
def _load_step(d_k, d_v, sample, key_head, e, k_scale, v_log, slot, phase, ks, vs, scales, full, free):
    """K, V and the scales of an entry: one buffer, freed as a whole."""
    mbarrier.wait(free.index(slot), phase ^ 1)
    _put(scales, slot * 2, k_scale)
    _put(scales, slot * 2 + 1, v_log)
    mbarrier.expect(full.index(slot), d_k.block_type.nbytes + d_v.block_type.nbytes)
    _tma_load(d_k, [sample, key_head, e >> 2, 0], full.index(slot), ks.index(slot))
    _tma_load(d_v, [sample, key_head, 0, e >> 2], full.index(slot), vs.index(slot))


@gluon.jit
def _put(buffer, i, x):
    buffer.index(i).store(gl.full([1], 0, gl.float32, gl.BlockedLayout([1], [32], [1], [0])) + x)


@gluon.jit
def _scales_of(p_scales, e):
    """(factor of K, log2 of V's) of an entry's keys. Beyond the last step an entry may be nowhere: the first keys'."""
    at = p_scales + gl.maximum(e >> 2, 0) // BLOCK * 2
    return gl.load(at), gl.load(at + 1)


@gluon.jit
def _few_keys(buffer, desc):
    """(1, 1, FEW, D): the place of the first keys in a buffer of K."""
    SHAPE: gl.constexpr = [buffer.shape[2] // FEW, 1, 1, FEW, buffer.shape[3]]
    if REINTERPRET:
        return buffer.reinterpret(buffer.dtype, SHAPE, desc.layout).index(0)
    else:
        return buffer._reinterpret(buffer.dtype, SHAPE, desc.layout).index(0)


@gluon.jit
def _few_values(buffer, desc):
    """(1, 1, D, FEW): the same in a buffer of V, whose rows are as long as their keys are many."""
    SHAPE: gl.constexpr = [buffer.shape[3] // FEW, 1, 1, buffer.shape[2], FEW]
    if REINTERPRET:
        return buffer.reinterpret(buffer.dtype, SHAPE, desc.layout).index(0)
    else:
        return buffer._reinterpret(buffer.dtype, SHAPE, desc.layout).index(0)


@gluon.jit
def _pack(p):
    """P (rows, keys) fp32 -> int32 (rows, keys / 16, 4): key 8 h + 2 c + b of each 16 is byte 2 h + b of word c."""
    x = p.reshape([p.shape[0], p.shape[1] // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    b0, b1 = gl.split(x)
    h0b0, h1b0 = gl.split(b0)
    h0b1, h1b1 = gl.split(b1)
    words = [h0b0, h0b1, h1b0, h1b1]
    return gl.inline_asm_elementwise(TO_E4M3, "=r,f,f,f,f", words, dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _byte(words, I: gl.constexpr):
    return (words >> (8 * I)).to(gl.int8).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _operand(words, LP: gl.constexpr):
    """What `_pack` made -> e4m3 (rows, keys) as first operand, without an instruction."""
    x = gl.join(gl.join(_byte(words, 0), _byte(words, 1)), gl.join(_byte(words, 2), _byte(words, 3)))
    x = x.permute((0, 1, 2, 4, 3)).reshape([words.shape[0], words.shape[1] * 16])
    return gl.convert_layout(x, LP)


# A register of its own carries a warp's vote to a branch, of which no tensor can be the condition.
DECLARE = gl.constexpr(".reg .b32 outgrown; mov.b32 outgrown, 0; mov.b32 $0, $1;")
VOTE = gl.constexpr(
    "{ .reg .pred p; .reg .b32 x; max.s32 x, $4, $5; max.s32 x, x, $6; max.s32 x, x, $7; "
    "setp.gt.s32 p, x, 0x43E00000; vote.sync.any.pred p, p, 0xffffffff; selp.b32 outgrown, 1, 0, p; "
    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
TELL = gl.constexpr("mov.b32 $0, outgrown;")


@gluon.jit
def _declare(x):
    """Once, before `_outgrown`."""
    gl.inline_asm_elementwise(DECLARE, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _outgrown(sums, x):
    """Whether one of the warp's sums, four a thread and none negative, is above 448, e4m3's largest, or NaN.

    x: any integer. Floats that are not negative have the order of their bits.
    """
    gl.inline_asm_elementwise(VOTE, "=r,=r,=r,=r,r,r,r,r", [sums], dtype=gl.int32, is_pure=False, pack=4)
    return gl.inline_asm_elementwise(TELL, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _raise(s, factor, v_log, m, l, scale2, L: gl.constexpr, CAP: gl.constexpr):
    """The running maximum after a step: rows' maxima, sums, and what they shrink by.

    s: (rows, keys) products of e4m3, which `factor` (rows,) makes logits in powers of 2; or capped ones.
    """
    if CAP:
        factor = factor * 0.0 + scale2
    m_new = gl.maximum(m, _row_max(s, L) * factor + v_log)
    m_new = gl.where(m_new > m + LAG, m_new, m)
    alpha = gl.exp2(m - m_new)
    return m_new, l * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout)), 1), alpha


@gluon.jit
def _exponentials(s, factor, v_log, m, scale2, CAP: gl.constexpr):
    """A step's P in fp32, and its sums, eight a row."""
    if CAP:
        factor = factor * 0.0 + scale2
    p = gl.exp2(s * gl.expand_dims(factor, 1) + gl.expand_dims(v_log + HEADROOM - m, 1))
    return p, gl.sum(_by_eight(p), 1)


@gluon.jit
def _settle(p, sums, m, l, alpha):
    """The same with maxima from which on no P is above 448, where one may be: such rows are left half of it."""
    most = gl.convert_layout(gl.max(sums, 1), m.type.layout)
    less = gl.where(most > 224.0, 112.0 / most, 1.0)
    by_eight = gl.expand_dims(gl.convert_layout(less, gl.SliceLayout(1, l.type.layout)), 1)
    return p * gl.expand_dims(less, 1), sums * by_eight, m - gl.log2(less), l * by_eight, alpha * less


@gluon.jit
def _cap(s, factor, CAP: gl.constexpr):
    """tanh of the logits over the soft-cap where there is one."""
    if CAP:
        return 1.0 - 2.0 / (1.0 + gl.exp2(s * gl.expand_dims(factor, 1)))
    else:
        return s


@gluon.jit
def _add_kept(acc, kept, m_kept, m, LO: gl.constexpr):
    """acc and the sum in shared memory, whose rows had the maxima `m_kept`."""
    old = gl.convert_layout(gl.exp2(m_kept - m), gl.SliceLayout(1, LO))
    return acc + kept.load(LO) * gl.expand_dims(old, 1)


@gluon.jit
def _walk(
    acc, m, l, words, p_entries, e, slot, phase, before, q, q_scale, k_scale, v_log, query, low, sink, scale2, ks, vs,
    kept, scales, full, free, start, count, kind,
    LISTED: gl.constexpr, RULE: gl.constexpr, CAP: gl.constexpr, RUNNING: gl.constexpr,
):  # fmt: skip
    """A row's steps from the second one on: Q K^T and softmax of each, P V of the one before. With the running maximum
    no P comes near e4m3's largest, and nobody has to look."""
    STAGES: gl.constexpr = ks.shape[0]
    HALF: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    BN: gl.constexpr = ks.shape[3]
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    LO: gl.constexpr = acc.type.layout
    LP: gl.constexpr = gl.DotOperandLayout(0, LO, 4)
    zero = gl.zeros([HALF, BN], gl.float32, L)
    m_kept = m
    for i in range(1, count):
        now = e
        e = _step(p_entries, start, i + 1, count, kind, BN, 1, LISTED, False, 1)
        s = warpgroup_mma(q, ks.index(slot).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
        values = vs.index(before).reshape([D, BN]).permute((1, 0))
        # After a sum was kept the next starts anew; the first has the sinks' in it.
        goes_on = (i % FLUSH != 1) | (i == 1)
        o = warpgroup_mma(_operand(words, LP), values, acc, use_acc=goes_on, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        s = _cap(s, q_scale * k_scale, CAP)
        if LISTED:  # else only the first step of a tile crosses the diagonal
            if (now & 3) != 0:
                s = _mask(s, query, low, sink, now >> 2, now, L, RULE)
        if RUNNING:
            m, l, alpha = _raise(s, q_scale * k_scale, v_log, m, l, scale2, L, CAP)
        p, sums = _exponentials(s, q_scale * k_scale, v_log, m, scale2, CAP)
        if not RUNNING:
            alpha = gl.full_like(m, 1.0)
            outgrown = _outgrown(sums, i)
            if outgrown != 0:
                p, sums, m, l, alpha = _settle(p, sums, m, l, alpha)
        l += sums * gl.exp2(-v_log)
        slot1, phase1 = _next(slot, phase, STAGES)
        mbarrier.wait(full.index(slot1), phase1, pred=i + 1 < count)
        k_scale = _receive(scales, slot1 * 2)
        v_log = _receive(scales, slot1 * 2 + 1)
        acc = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(free.index(before), count=1)
        if RUNNING:
            acc = _rescale(acc, alpha, LO)
        else:
            if outgrown != 0:
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, LO)), 1)
        if i % FLUSH == 0:
            if i == FLUSH:
                tma.store_wait(0)  # of the tile before
                kept.store(acc)
            else:
                kept.store(_add_kept(acc, kept, m_kept, m, LO))
            m_kept = m
        words = _pack(p)
        before = slot
        slot = slot1
        phase = phase1
    return acc, m, m_kept, l, words, before, slot, phase


@gluon.jit
def _consume(
    d_o, d_few_k, d_few_v, qs, ks, vs, kept_sums, scales, taken, shifts, q_full, q_free, full, free, mail, m_full,
    m_free, p_entries, p_marks, p_out, p_lse, p_sinks, p_part, p_part_lse, mode, scale, cap_scale, heads, queries,
    q_offset,
    WHO: gl.constexpr, LISTED: gl.constexpr, RULE: gl.constexpr, CAP: gl.constexpr, LSE: gl.constexpr,
    SINKS: gl.constexpr, SPLIT: gl.constexpr, EARLY: gl.constexpr, NARROW_FORM: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    Q_STAGES: gl.constexpr = q_full.shape[0]
    HALF: gl.constexpr = d_o.block_type.shape[2]
    D: gl.constexpr = d_o.block_type.shape[3]
    BN: gl.constexpr = ks.shape[3]
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32])
    LN: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, FEW, 32])
    LQ: gl.constexpr = gl.DotOperandLayout(0, L, 4)
    LP: gl.constexpr = gl.DotOperandLayout(0, LO, 4)
    scale2 = scale * LOG2E
    per_product = scale2
    if CAP:
        per_product = cap_scale
    zero = gl.zeros([HALF, BN], gl.float32, L)
    zero_few = gl.zeros([HALF, FEW], gl.float32, LN)
    kept = kept_sums.index(WHO)
    slot = 0
    phase = 0
    q_slot = 0
    q_phase = 0
    m_slot = 0
    m_phase = 0
    mbarrier.wait(m_full.index(0), 0)
    count = _receive(mail, COUNT)
    while count > 0:
        row, sample_head, start, kv_start, kind, e, e1 = _receive_item(mail, m_slot)
        lane = WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, L))
        query = gl.where((kind & EMPTY) != 0, -1, row + q_offset - kv_start + lane)
        sink = 0
        low = query
        running = mode != FIXED
        if RULE:
            sink, low = _receive_rule(mail, m_slot, query)
            running = running | (sink == 0)  # at a window's edge a row may see nothing
        acc = gl.zeros([HALF, D], gl.float32, LO)
        m = gl.full([HALF], FLOOR, gl.float32, gl.SliceLayout(1, L))
        l = gl.sum(_by_eight(zero), 1)
        mbarrier.wait(q_full.index(q_slot), q_phase)
        x = qs.index(q_slot * 2 + WHO).reshape([HALF, D]).load(LQ).to(gl.float32)
        mbarrier.arrive(q_free.index(q_slot), count=1)
        q_slot, q_phase = _next(q_slot, q_phase, Q_STAGES)
        if (LSE or SINKS or SPLIT) and not CAP:
            # What was taken off the keys is taken off all logits of a row. Weights know nothing of it; the logarithm of
            # their sum does, and what is merged by that.
            shift = taken.index(2 * m_slot).load(gl.SliceLayout(0, LQ)).to(gl.float32)
            shifts.index(WHO).store(gl.sum(x * gl.expand_dims(shift, 0), 1) * scale2)
        largest = gl.maximum(gl.max(gl.abs(x), 1), SMALLEST)
        x = x * gl.expand_dims(LARGEST / largest, 1)
        q = gl.inline_asm_elementwise(TO_E4M3, "=r,f,f,f,f", [x], dtype=gl.float8e4nv, is_pure=True, pack=4)
        q_scale = gl.convert_layout(largest, gl.SliceLayout(1, L)) * (per_product / LARGEST)
        if NARROW_FORM:
            if (kind & NARROW) != 0:
                mbarrier.wait(full.index(slot), phase)
                few_scale = _receive(scales, slot * 2)
                few_log = _receive(scales, slot * 2 + 1)
                few_k = _few_keys(ks.index(slot), d_few_k).reshape([FEW, D]).permute((1, 0))
                s = warpgroup_mma(q, few_k, zero_few, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                factor = gl.convert_layout(q_scale * few_scale, gl.SliceLayout(1, LN))
                s = _cap(s, factor, CAP)
                key = gl.arange(0, FEW, gl.SliceLayout(0, LN))
                s = gl.where(gl.expand_dims(key < sink, 0), s, float("-inf"))
                m_few = gl.convert_layout(m, gl.SliceLayout(1, LN))
                l_few = gl.sum(_by_eight(zero_few), 1)
                m_few, l_few, alpha = _raise(s, factor, few_log, m_few, l_few, scale2, LN, CAP)
                p, sums = _exponentials(s, factor, few_log, m_few, scale2, CAP)
                l_few += sums * gl.exp2(-few_log)
                m = gl.convert_layout(m_few, gl.SliceLayout(1, L))
                l = gl.convert_layout(l_few, l.type.layout)
                few_v = _few_values(vs.index(slot), d_few_v).reshape([D, FEW]).permute((1, 0))
                acc = warpgroup_mma(_operand(_pack(p), LP), few_v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(free.index(slot), count=1)
                slot, phase = _next(slot, phase, STAGES)
        mbarrier.wait(full.index(slot), phase)
        k_scale = _receive(scales, slot * 2)
        v_log = _receive(scales, slot * 2 + 1)
        s = warpgroup_mma(q, ks.index(slot).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        s = _cap(s, q_scale * k_scale, CAP)
        if (e & 3) != 0:
            s = _mask(s, query, low, sink, e >> 2, e, L, RULE)
        m, l, alpha = _raise(s, q_scale * k_scale, v_log, m, l, scale2, L, CAP)
        p, sums = _exponentials(s, q_scale * k_scale, v_log, m, scale2, CAP)
        l += sums * gl.exp2(-v_log)
        if NARROW_FORM:
            acc = _rescale(acc, alpha, LO)
        words = _pack(p)
        e = e1
        before = slot
        slot, phase = _next(slot, phase, STAGES)
        mbarrier.wait(full.index(slot), phase, pred=count > 1)
        k_scale = _receive(scales, slot * 2)
        v_log = _receive(scales, slot * 2 + 1)
        others = (
            slot, phase, before, q, q_scale, k_scale, v_log, query, low, sink, scale2, ks, vs, kept, scales, full, free,
            start, count, kind,
        )  # fmt: skip
        if running:
            acc, m, m_kept, l, words, before, slot, phase = _walk(
                acc, m, l, words, p_entries, e, *others, LISTED, RULE, CAP, True
            )
        else:
            acc, m, m_kept, l, words, before, slot, phase = _walk(
                acc, m, l, words, p_entries, e, *others, LISTED, RULE, CAP, False
            )
        values = vs.index(before).reshape([D, BN]).permute((1, 0))
        goes_on = (count % FLUSH != 1) | (count == 1)
        acc = warpgroup_mma(_operand(words, LP), values, acc, use_acc=goes_on, is_async=True)
        part = -1
        if SPLIT:
            part = _receive(mail, m_slot * MAIL + SLOT)
        number = _receive(mail, m_slot * MAIL + NUMBER)
        sample = sample_head // heads
        head = sample_head - sample * heads
        lane_o = WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LO))
        total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, LO))
        top = gl.convert_layout(m, gl.SliceLayout(1, LO)) - HEADROOM
        if (LSE or SINKS or SPLIT) and not CAP:
            top = top + shifts.index(WHO).load(gl.SliceLayout(1, LO))
        # A row that kept nothing has a total of exactly 0; NaN inputs stay NaN.
        valid = (lane_o >= (kind & 255)) & (lane_o < ((kind >> 8) & 255))
        seen = valid & (total != 0.0)
        if mode == FIXED:
            _mark(p_marks, number, valid & ((total < float("inf")) == 0))  # NaN is not
        weights = total
        factor = 1.0 / total
        if SINKS:
            z = gl.load(p_sinks + head).to(gl.float32) * LOG2E
            if SPLIT:  # partial results leave the sink to the merge
                z = gl.where(part >= 0, float("-inf"), z)
            total, factor, top = _with_sink(total, top, z)
        tma.store_wait(0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(before), count=1)
        if count > FLUSH:
            acc = _add_kept(acc, kept, m_kept, m, LO)
        common = taken.index(2 * m_slot + 1).load(gl.SliceLayout(0, LO)).to(gl.float32)
        mbarrier.arrive(m_free.index(m_slot), count=1)
        m_slot, m_phase = _next(m_slot, m_phase, 2)
        result = acc * gl.expand_dims(factor, 1) + gl.expand_dims(common, 0) * gl.expand_dims(weights * factor, 1)
        result = gl.where(gl.expand_dims(seen, 1), result, 0.0)
        whole = part < 0
        if LSE:
            lse = gl.where(seen, (top + gl.log2(total)) * LN2, float("-inf"))
            inside = (row + lane_o >= 0) & (row + lane_o < queries) & whole
            gl.store(p_lse + (sample_head.to(gl.int64) * queries + row) + lane_o, lse, mask=inside)
        staging = _staging(kept, d_o)
        if SPLIT:
            if part >= 0:
                lse2 = gl.where(seen, top + gl.log2(total), float("-inf"))
                _store_part(p_part, p_part_lse, part, lane_o, lse2, result, LO)
            else:
                _store(d_o, p_out, sample, head, row + WHO * HALF, result, staging, queries, heads, LO, EARLY)
        else:
            _store(d_o, p_out, sample, head, row + WHO * HALF, result, staging, queries, heads, LO, EARLY)
        mbarrier.wait(m_full.index(m_slot), m_phase)
        count = _receive(mail, m_slot * MAIL + COUNT)
    tma.store_wait(0)


@gluon.jit
def _staging(kept, d_o):
    """A buffer for an output's rows (1, 1, HALF, D), where the sums that were kept lay."""
    SHAPE: gl.constexpr = [2] + d_o.block_type.shape
    if REINTERPRET:
        return kept.reinterpret(d_o.dtype, SHAPE, d_o.layout).index(0)
    else:
        return kept._reinterpret(d_o.dtype, SHAPE, d_o.layout).index(0)


RUN_TIME_NUMBERS = [
    "mode", "scale", "cap_scale", "items", "heads", "group", "blocks", "queries", "q_offset", "rule_sample",
    "rule_head", "heads_per_plan",
]  # fmt: skip
POINTERS = [
    "p_items", "p_entries", "p_counters", "p_marks", "p_rule", "p_scales", "p_common", "p_out", "p_lse", "p_sinks",
    "p_part", "p_part_lse",
]  # fmt: skip


# Nothing is specialised on a value or an alignment, so that a compiled kernel may be launched again with any other call
# of the same types.
@gluon.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=POINTERS)
def attention(
    d_q, d_k, d_v, d_o, d_few_k, d_few_v,
    p_items, p_entries, p_counters, p_rule, p_scales, p_common, p_out, p_lse, p_sinks, p_part, p_part_lse, p_marks,
    mode, scale, cap_scale, items, heads, group, blocks, queries, q_offset, rule_sample, rule_head, heads_per_plan,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, LISTED: gl.constexpr, RULE: gl.constexpr, CAP: gl.constexpr,
    LSE: gl.constexpr, SINKS: gl.constexpr, SPLIT: gl.constexpr, EARLY: gl.constexpr, NARROW_FORM: gl.constexpr,
):  # fmt: skip
    """q (B, H, Q, D) in 16 bits, K and V as `quantise` wrote them -> out, in q's type, and lse.

    p_scales: (B * G, blocks, 2). p_common: (B * G, 2, D), what keys and values had in common.
    """
    _declare(items)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    HALF: gl.constexpr = d_o.block_type.shape[2]
    D: gl.constexpr = d_o.block_type.shape[3]
    qs = gl.allocate_shared_memory(d_q.dtype, [2 * Q_STAGES] + d_q.block_type.shape, d_q.layout)
    ks = gl.allocate_shared_memory(d_k.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    vs = gl.allocate_shared_memory(d_v.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    kept = gl.allocate_shared_memory(gl.float32, [2, HALF, D], gl.NVMMASharedLayout(128, 32, 2))
    scales = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1], ONE)
    taken = gl.allocate_shared_memory(gl.bfloat16, [4, D], ONE)  # of keys and values, each of two items
    shifts = gl.allocate_shared_memory(gl.float32, [2, HALF], ONE)
    mail = gl.allocate_shared_memory(gl.int32, [2 * MAIL, 1], ONE)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    m_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    m_free = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(m_full.index(i), count=1)
        mbarrier.init(m_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                d_o, d_few_k, d_few_v, qs, ks, vs, kept, scales, taken, shifts, q_full, q_free, full, free, mail,
                m_full, m_free, p_entries, p_marks, p_out, p_lse, p_sinks, p_part, p_part_lse, mode, scale, cap_scale,
                heads, queries, q_offset, 0, LISTED, RULE, CAP, LSE, SINKS, SPLIT, EARLY, NARROW_FORM,
            )),
            (_consume, (
                d_o, d_few_k, d_few_v, qs, ks, vs, kept, scales, taken, shifts, q_full, q_free, full, free, mail,
                m_full, m_free, p_entries, p_marks, p_out, p_lse, p_sinks, p_part, p_part_lse, mode, scale, cap_scale,
                heads, queries, q_offset, 1, LISTED, RULE, CAP, LSE, SINKS, SPLIT, EARLY, NARROW_FORM,
            )),
            (_produce, (
                d_q, d_k, d_v, d_few_k, d_few_v, qs, ks, vs, scales, taken, q_full, q_free, full, free, mail, m_full,
                m_free, p_items, p_entries, p_counters, p_marks, p_rule, p_scales, p_common, mode, items, heads, group,
                blocks, rule_sample, rule_head, heads_per_plan, LISTED, RULE, SPLIT, NARROW_FORM,
                (LSE or SINKS or SPLIT) and not CAP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
