"""The census of a compiled GPU program, on HLO small enough to count by hand, in the forms that XLA writes."""

import pytest

from streamdit_jax.plan.kernels import census, kernels
from streamdit_jax.plan.table import table

# Two branches of a forward: with guidance two streams, without it one. A layer has one product with its bias, one fp8
# product, windows moved by a gather, an attention of cuDNN's, a fused norm by a Mosaic kernel, and a weight converted.
LAYER = """
%fused_norm_{n} (p: bf16[{b},1024,512], q: f32[512]) -> bf16[{b},1024,512] {{
  %p.{n} = bf16[{b},1024,512]{{2,1,0}} parameter(0)
  %q.{n} = f32[512]{{0}} parameter(1)
  %wide.{n} = bf16[{b},1024,512]{{2,1,0}} broadcast(%q.{n}), dimensions={{2}}
  ROOT %scaled.{n} = bf16[{b},1024,512]{{2,1,0}} multiply(%p.{n}, %wide.{n})
}}

%fused_gather_{n} (g: bf16[{b},1024,512], i: s32[4]) -> bf16[{b},1024,512] {{
  %g.{n} = bf16[{b},1024,512]{{2,1,0}} parameter(0)
  %i.{n} = s32[4]{{0}} parameter(1)
  ROOT %moved.{n} = bf16[{b},1024,512]{{2,1,0}} gather(%g.{n}, %i.{n}), offset_dims={{0}}
}}

%fused_convert_{n} (w: bf16[512,512]) -> f32[512,512] {{
  %w.{n} = bf16[512,512]{{1,0}} parameter(0)
  ROOT %converted.{n} = f32[512,512]{{1,0}} convert(%w.{n})
}}

%fused_slice_{n} (s: bf16[3,{b},1024,512]) -> bf16[{b},1024,512] {{
  %s.{n} = bf16[3,{b},1024,512]{{3,2,1,0}} parameter(0)
  %one.{n} = bf16[1,{b},1024,512]{{3,2,1,0}} slice(%s.{n}), slice={{[0:1]}}
  ROOT %flat.{n} = bf16[{b},1024,512]{{2,1,0}} bitcast(%one.{n})
}}

%branch_{n} (given: (bf16[1024,1024], f32[512], bf16[{b},1024,512])) -> bf16[{b},1024,512] {{
  %given.{n} = (bf16[1024,1024]{{1,0}}, f32[512]{{0}}, bf16[{b},1024,512]{{2,1,0}}) parameter(0)
  %weight.{n} = bf16[1024,1024]{{1,0}} get-tuple-element(%given.{n}), index=0
  %scale.{n} = f32[512]{{0}} get-tuple-element(%given.{n}), index=1
  %x.{n} = bf16[{b},1024,512]{{2,1,0}} get-tuple-element(%given.{n}), index=2
  %norm.{n} = bf16[{b},1024,512]{{2,1,0}} fusion(%x.{n}, %scale.{n}), kind=kLoop, calls=%fused_norm_{n}, metadata={{op_name="jit(step)/DiT/DiT._blocks/Block/norm/mul"}}
  %gemm.{n} = (bf16[{b},1024,512]{{2,1,0}}, s8[4194304]{{0}}) custom-call(%norm.{n}, %weight.{n}, %scale.{n}), custom_call_target="__cublas$lt$matmul", metadata={{op_name="jit(step)/DiT/DiT._blocks/Block/qkv/dot_general"}}, backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}},"epilogue":"BIAS"}}}}
  %out.{n} = bf16[{b},1024,512]{{2,1,0}} get-tuple-element(%gemm.{n}), index=0
  %eight.{n} = (bf16[{b},1024,512]{{2,1,0}}, s8[64]{{0}}) custom-call(%out.{n}, %weight.{n}), custom_call_target="__cublas$lt$matmul$f8", backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["2"],"lhs_batch_dimensions":[]}},"epilogue":"DEFAULT"}}}}
  %indices.{n} = s32[4]{{0}} constant({{0,1,2,3}})
  %moved_windows.{n} = bf16[{b},1024,512]{{2,1,0}} fusion(%out.{n}, %indices.{n}), kind=kLoop, calls=%fused_gather_{n}, metadata={{op_name="jit(step)/DiT/DiT._blocks/Block/self_attention/gather"}}
  %view.{n} = bf16[{b},1024,512]{{2,1,0}} bitcast(%moved_windows.{n})
  %sdpa.{n} = (bf16[{b},1024,512]{{2,1,0}}, u8[0]{{0}}) custom-call(%view.{n}, %view.{n}, %view.{n}), custom_call_target="__cudnn$fmhaSoftmax", metadata={{op_name="jit(step)/DiT/DiT._blocks/Block/self_attention/attend"}}
  %attended.{n} = bf16[{b},1024,512]{{2,1,0}} get-tuple-element(%sdpa.{n}), index=0
  %fused.{n} = bf16[{b},1024,512]{{2,1,0}} custom-call(%attended.{n}, %scale.{n}), custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(step)/DiT/DiT._blocks/Block/residual"}}
  %square.{n} = bf16[512,512]{{1,0}} bitcast(%weight.{n})
  %other.{n} = f32[512,512]{{1,0}} fusion(%weight.{n}), kind=kLoop, calls=%fused_convert_{n}, metadata={{op_name="jit(step)/DiT/DiT._blocks/Block/convert"}}
  %big.{n} = f32[1024,1024]{{1,0}} copy(%weight.{n}), metadata={{op_name="jit(step)/DiT/head/copy"}}
  ROOT %sum.{n} = bf16[{b},1024,512]{{2,1,0}} add(%fused.{n}, %x.{n}), metadata={{op_name="jit(step)/DiT/head/add"}}
}}
"""  # noqa: E501
MODULE = (
    "HloModule jit_step, is_scheduled=true\n"
    + LAYER.format(n="guided", b=2)
    + LAYER.format(n="plain", b=1)
    + """
ENTRY %main (params__kernel: bf16[1024,1024], scale: f32[512], x: bf16[1,1024,512], y: bf16[2,1024,512]) -> f32[] {
  %kernel = bf16[1024,1024]{1,0} parameter(0), metadata={op_name="params[\\'blocks\\'][0][\\'kernel\\']"}
  %scale = f32[512]{0} parameter(1), metadata={op_name="scale"}
  %x = bf16[1,1024,512]{2,1,0} parameter(2), metadata={op_name="state.latents"}
  %y = bf16[2,1024,512]{2,1,0} parameter(3), metadata={op_name="state.latents"}
  %any = pred[] constant(true)
  %two = (bf16[1024,1024]{1,0}, f32[512]{0}, bf16[2,1024,512]{2,1,0}) tuple(%kernel, %scale, %y)
  %one = (bf16[1024,1024]{1,0}, f32[512]{0}, bf16[1,1024,512]{2,1,0}) tuple(%kernel, %scale, %x)
  ROOT %chosen = bf16[1,1024,512]{2,1,0} conditional(%any, %two, %one), true_computation=%branch_guided, false_computation=%branch_plain
}
"""  # noqa: E501
)
TOKENS = 1024 * 512 * 2  # bytes of one stream's hidden states
WEIGHT = 1024 * 1024 * 2


def test_kinds_bytes_and_products():
    found = census(MODULE, guided=False, layers=1)
    kinds = found["kinds"]
    assert {kind: each["count"] for kind, each in kinds.items()} == {
        "elementwise": 3,
        "gemm": 1,
        "fp8_gemm": 1,
        "copy": 2,
        "cudnn": 1,
        "mosaic_gpu": 1,
    }
    assert found["launches"] == 9 and found["per_layer"] == 7  # all but the two of the head
    flops = 2 * 1024 * 512 * 512  # of one stream, contracted over its last axis
    assert kinds["gemm"] == {"count": 1, "read_bytes": TOKENS + WEIGHT + 2048, "written_bytes": TOKENS, "flops": flops}
    assert kinds["fp8_gemm"]["flops"] == flops and found["epilogues"] == {
        "gemm": {"BIAS": 1},
        "fp8_gemm": {"DEFAULT": 1},
    }
    assert kinds["cudnn"]["read_bytes"] == kinds["cudnn"]["written_bytes"] == TOKENS  # one operand, given three times
    assert found["calls"] == {"__cudnn$fmhaSoftmax": 1, "mosaic_gpu_v2": 1}


def test_of_a_conditional_the_branch_that_runs():
    alone, guided = (census(MODULE, guided=guided, layers=1)["kinds"]["gemm"] for guided in (False, True))
    assert guided["flops"] == 2 * alone["flops"] and guided["written_bytes"] == 2 * alone["written_bytes"]


def test_copies_and_weights_that_are_copied():
    found = census(MODULE, guided=False, layers=1)
    assert found["copies"] == {
        "count": 2,
        "bytes": 2 * TOKENS + 16 + WEIGHT + 2 * WEIGHT,
        "of": {"self_attention/gather": 1, "head/copy": 1},
    }
    # The fusion to f32[512,512] writes fewer numbers than the weight has: it takes a part, and copies none.
    assert found["weight_copies"] == {"count": 1, "bytes": 3 * WEIGHT, "of": ["params['blocks'][0]['kernel']"]}
    assert found["largest"][0]["operation"] == "head/copy" and found["arrays"][0]["type"] == "f32[1024,1024]"


LOOP = """HloModule jit_step

%fused_dot (a: bf16[64,32], w: bf16[5,32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %w = bf16[5,32,16]{2,1,0} parameter(1)
  %of_layer = bf16[1,32,16]{2,1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,32,16}
  %flat = bf16[32,16]{1,0} bitcast(%of_layer)
  ROOT %product = bf16[64,16]{1,0} dot(%a, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_update (whole: bf16[5,64,16], part: bf16[64,16]) -> bf16[5,64,16] {
  %whole = bf16[5,64,16]{2,1,0} parameter(0)
  %part = bf16[64,16]{1,0} parameter(1)
  %shaped = bf16[1,64,16]{2,1,0} bitcast(%part)
  ROOT %updated = bf16[5,64,16]{2,1,0} dynamic-update-slice(%whole, %shaped, %i)
}

%body (carry: (s32[], bf16[64,32], bf16[5,32,16])) -> (s32[], bf16[64,32], bf16[5,32,16]) {
  %carry = (s32[], bf16[64,32]{1,0}, bf16[5,32,16]{2,1,0}, bf16[5,64,16]{2,1,0}) parameter(0)
  %x = bf16[64,32]{1,0} get-tuple-element(%carry), index=1
  %stack = bf16[5,32,16]{2,1,0} get-tuple-element(%carry), index=2
  %kept = bf16[5,64,16]{2,1,0} get-tuple-element(%carry), index=3
  %dot = bf16[64,16]{1,0} fusion(%x, %stack), kind=kCustom, calls=%fused_dot
  ROOT %keep = bf16[5,64,16]{2,1,0} fusion(%kept, %dot), kind=kLoop, calls=%fused_update
}

%condition (carry.1: (s32[], bf16[64,32], bf16[5,32,16])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[64,32], stack: bf16[5,32,16]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %params = bf16[5,32,16]{2,1,0} parameter(1), metadata={op_name="state.params['blocks']['kernel']"}
  %all = bf16[5,64,16]{2,1,0} parameter(2), metadata={op_name="state.kept"}
  %init = (s32[], bf16[64,32]{1,0}, bf16[5,32,16]{2,1,0}, bf16[5,64,16]{2,1,0}) tuple(%zero, %p, %params, %all)
  ROOT %loop = (s32[]) while(%init), condition=%condition, body=%body
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_slices_as_what_they_take():
    found = census(LOOP, guided=True, layers=5)
    gemm = found["kinds"]["gemm"]
    assert gemm["count"] == 5 and gemm["flops"] == 5 * 2 * 64 * 32 * 16
    assert gemm["read_bytes"] == 5 * 2 * (64 * 32 + 32 * 16)  # one layer's kernel each time, not the stack
    update = found["kinds"]["copy"]
    assert (update["read_bytes"], update["written_bytes"]) == (5 * 2 * 64 * 16, 5 * 2 * 64 * 16)
    assert found["weight_copies"]["count"] == 0


def test_a_scan_that_takes_a_layers_weights_out_of_the_stack_copies_them():
    """As XLA does before its own matrix products: a slice of a MiB or more, in memory of its own, for every layer."""
    hlo = """HloModule scan

ENTRY %main (p: bf16[8,1024,1024]) -> bf16[1,1024,1024] {
  %stack = bf16[8,1024,1024]{2,1,0} parameter(0), metadata={op_name="params['blocks']['up']['kernel']"}
  ROOT %layer = bf16[1,1024,1024]{2,1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,1024,1024}
}
"""
    assert census(hlo, guided=True, layers=8)["weight_copies"]["of"] == ["params['blocks']['up']['kernel']"]


@pytest.mark.parametrize(
    "line, kind",
    [
        ('%k = bf16[2,8,8]{2,1,0} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton"', "triton"),
        ('%k = bf16[2,8,8]{2,1,0} custom-call(%p), custom_call_target="annotate"', "other"),
        ("%k = f32[2,8,8]{2,1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add", "collective"),
        ("%k = f32[2,8,8]{2,1,0} dot(%p, %p), lhs_batch_dims={0}, lhs_contracting_dims={2}", "batched_gemm"),
        ("%k = f8e4m3fn[8,8]{1,0} dot(%e, %e), lhs_contracting_dims={1}", "fp8_gemm"),
        ("%k = f32[2,8,8]{2,1,0} exponential(%p)", "elementwise"),
        ("%k = f32[8,2,8]{2,1,0} transpose(%p), dimensions={1,0,2}", "copy"),
    ],
)
def test_kinds(line, kind):
    hlo = f"""HloModule one

ENTRY %main (p: f32[2,8,8], e: f8e4m3fn[8,8]) -> f32[] {{
  %p = f32[2,8,8]{{2,1,0}} parameter(0)
  %e = f8e4m3fn[8,8]{{1,0}} parameter(1)
  {line}
}}
"""
    ((kernel, count),) = kernels(hlo, guided=True)
    assert (kernel.kind, count) == (kind, 1)


def test_the_table_tells_of_kernels():
    report = {
        "config": "tiny",
        "what": "stream",
        "scheme": "N8c2s1",
        "guidance": 1.0,
        "topology": "h200",
        "slices": 1,
        "devices": 1,
        "mesh": {"data": 1},
        "parameters": 10,
        "precision": "fp8",
        "argument_bytes_per_device": 1,
        "temporary_bytes_per_device": 1,
        "hbm_share": 0.1,
        "hbm_bytes_per_device": 10,
        "flops_per_step": None,
        "collectives": {},
        "compile_seconds": 1.0,
        "host_peak_bytes": 1,
        "kernels": census(MODULE, guided=False, layers=1),
    }
    lines = {line.split("  ")[0]: line for line in table(report).splitlines()}
    assert "9 launches, 7 a layer" in lines["kernels"]
    assert lines["gemm"].endswith("1, 3.0 MiB read, 1.0 MiB written") and "1, 6.0 MiB" in lines["weight copies"]
