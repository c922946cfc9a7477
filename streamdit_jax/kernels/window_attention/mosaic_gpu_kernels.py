"""Three kernels for Hopper: windowed attention forward, and its gradients (arXiv 2307.08691; schedule of 2407.08608).

With scores s = q·k/√d, weights p = exp(s - lse), and delta = Σ_d dO·O:

    out = p·v      dv = pᵀ·dO      ds = p ∘ (dO·vᵀ - delta)      dq = ds·k/√d      dk = dsᵀ·q/√d

Exponentials are powers of two: log₂e is part of the scale, and log-sum-exp is kept in base 2.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from streamdit_jax.kernels.window_attention import mosaic_gpu_pipeline as pipeline
from streamdit_jax.kernels.window_attention.mosaic_gpu_pipeline import per_row
from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import ROWS, Work

LOG2_E = math.log2(math.e)


def forward(query, key, value, work: Work, *, save: bool, stages: int, **how):
    """The output, [b, tokens, heads, dim]; with `save` also the log-sum-exp in base 2, float32 [b, heads, tokens].

    While a tile's scores become weights, the product of the weights before it with their values runs beside it.
    """
    dim, columns = query.shape[-1], work.columns
    scale = LOG2_E / math.sqrt(dim)

    def compute(here, turns, owned, met, count, step):
        (queries,), (keys, values) = owned, met

        def place(j):
            return lax.rem(step + j, stages)

        [q] = queries.wait(here.warpgroup)
        [k] = keys.wait(place(0))
        turns.take()

        def first(scores):
            scores.add(q, k, transposed=True)
            turns.give()
            return scores.read()

        s = here.accumulators(first, (ROWS, columns))
        keys.release(place(0))
        top = s.max(axis=1)
        weights = jnp.exp2(s * scale - per_row(top * scale, s))
        total = weights.sum(axis=1)

        def tile(j, carry):
            out, weights, top, total = carry
            [k], [v] = keys.wait(place(j)), values.wait(place(j - 1))
            turns.take()

            def products(scores, sums):
                sums.write(out)
                scores.add(q, k, transposed=True)
                sums.add(weights, v)
                turns.give()
                s = scores.read(pending=1)
                keys.release(place(j))
                new_top = jnp.maximum(top, s.max(axis=1))
                fade = jnp.exp2((top - new_top) * scale)
                p = jnp.exp2(s * scale - per_row(new_top * scale, s))
                new_total = total * fade + p.sum(axis=1)
                p, fade, new_top, new_total = lax.optimization_barrier((p, fade, new_top, new_total))
                new_out = sums.read()
                values.release(place(j - 1))
                # The product has read the registers of the last weights: only now may these take their place.
                p, new_out = lax.optimization_barrier((p, new_out))
                return new_out * per_row(fade, new_out), p.astype(weights.dtype), new_top, new_total

            return here.accumulators(products, (ROWS, columns), (ROWS, dim))

        carry = (here.zeros(ROWS, dim), weights.astype(query.dtype), top, total)
        out, weights, top, total = lax.fori_loop(1, count, tile, carry)
        queries.release(here.warpgroup)
        [v] = values.wait(place(count - 1))

        def last(sums):
            sums.write(out)
            sums.add(weights, v)
            return sums.read()

        out = here.accumulators(last, (ROWS, dim))
        values.release(place(count - 1))
        out = out * per_row(1 / total, out)
        return (out, top + jnp.log(total) * math.sqrt(dim))[: 1 + save]

    batch, tokens, heads, _ = query.shape
    outputs = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
    ][: 1 + save]
    return pipeline.run(
        compute,
        (query, key, value),
        name="window_attention",
        work=work,
        owned=((0,),),
        met=((1,), (2,)),
        outputs=outputs,
        stages=stages,
        turns=True,
        **how,
    )


def query_gradient(query, key, value, gradient, lse, delta, work: Work, *, stages: int, **how):
    """dq, from dO, log-sum-exp and delta."""
    dim, columns = query.shape[-1], work.columns
    scale = 1 / math.sqrt(dim)

    def compute(here, turns, owned, met, count, step):
        (rows,), (keys, values) = owned, met
        *_, lse, delta = rows.wait(here.warpgroup)
        lse, delta = here.per_row(lse), here.per_row(delta)

        def tile(j, dq):
            place = lax.rem(step + j, stages)

            def products(scores, weight_gradients, sums):
                scores.write(lax.broadcast_in_dim(-lse, (ROWS, columns), [0]))
                weight_gradients.write(lax.broadcast_in_dim(-delta, (ROWS, columns), [0]))
                q, do, *_ = rows.tiles(here.place())
                [k] = keys.wait(place)
                scores.add(q, k, transposed=True)
                [v] = values.wait(place)
                weight_gradients.add(do, v, transposed=True)
                p = jnp.exp2(scores.read(pending=1) * (scale * LOG2_E))
                ds = p * weight_gradients.read()
                values.release(place)
                sums.write(dq)
                sums.add(ds.astype(query.dtype), k)
                new = sums.read()
                keys.release(place)
                return new

            return here.accumulators(products, (ROWS, columns), (ROWS, columns), (ROWS, dim))

        dq = lax.fori_loop(0, count, tile, here.zeros(ROWS, dim))
        rows.release(here.warpgroup)
        return (dq * scale,)

    return pipeline.run(
        compute,
        (query, gradient, lse, delta, key, value),
        name="window_attention_query_gradient",
        work=work,
        owned=((0, 1, 2, 3),),
        met=((4,), (5,)),
        outputs=[jax.ShapeDtypeStruct(query.shape, query.dtype)],
        stages=stages,
        turns=False,
        **how,
    )


def key_value_gradient(query, key, value, gradient, lse, delta, work: Work, *, stages: int, **how):
    """dk and dv, from dO, log-sum-exp and delta. Rows are keys here, and columns queries."""
    dim, columns = query.shape[-1], work.columns
    scale = 1 / math.sqrt(dim)

    def compute(here, turns, owned, met, count, step):
        (rows,), (queries, gradients) = owned, met
        rows.wait(here.warpgroup)

        def tile(j, carry):
            dk, dv = carry
            place = lax.rem(step + j, stages)

            def products(scores, weight_gradients, dk_sums, dv_sums):
                k, v = rows.tiles(here.place())
                q, lse = queries.wait(place)
                do, delta = gradients.wait(place)
                scores.write(lax.broadcast_in_dim(-here.per_column(lse), (ROWS, columns), [1]))
                weight_gradients.write(lax.broadcast_in_dim(-here.per_column(delta), (ROWS, columns), [1]))
                scores.add(k, q, transposed=True)
                weight_gradients.add(v, do, transposed=True)
                p = jnp.exp2(scores.read(pending=1) * (scale * LOG2_E))
                dv_sums.write(dv)
                dv_sums.add(p.astype(query.dtype), do)
                ds = p * weight_gradients.read(pending=1)
                dk_sums.write(dk)
                dk_sums.add(ds.astype(query.dtype), q)
                new_dv = dv_sums.read(pending=1)
                gradients.release(place)
                new_dk = dk_sums.read()
                queries.release(place)
                return new_dk, new_dv

            return here.accumulators(products, (ROWS, columns), (ROWS, columns), (ROWS, dim), (ROWS, dim))

        dk, dv = lax.fori_loop(0, count, tile, (here.zeros(ROWS, dim), here.zeros(ROWS, dim)))
        rows.release(here.warpgroup)
        return dk * scale, dv

    return pipeline.run(
        compute,
        (query, gradient, lse, delta, key, value),
        name="window_attention_key_value_gradient",
        work=work,
        owned=((4, 5),),
        met=((0, 2), (1, 3)),
        outputs=[jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
        stages=stages,
        turns=False,
        **how,
    )
