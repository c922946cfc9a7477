"""What is read from HLO: kinds, axes, counts and bytes, through loops, branches and asynchronous pairs."""

import numpy as np
import pytest

from streamdit_jax.plan.collectives import axes_of, bytes_of, collectives, groups_of, summary

MESH = {"data": 2, "fsdp": 4, "window": 1, "tensor": 1}

# In the forms of three compilers: types beside operands (older texts), layouts with tiles (TPU), starts and dones.
HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %carry = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %whole = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), replica_groups=[2,4]<=[8]
  %start = (bf16[8,16], bf16[8,16], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,4},{4,0}}
  %done = bf16[8,16]{1,0} collective-permute-done(%start)
  ROOT %out = (s32[], bf16[8,16]) tuple(%i, %done)
}

%condition (carry: (s32[], bf16[8,16])) -> pred[] {
  %carry.1 = (s32[], bf16[8,16]) parameter(0)
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%little (y: f32[4]) -> f32[4] {
  ROOT %none = f32[4]{0} parameter(0)
}

%much (y: f32[4]) -> f32[4] {
  %y = f32[4]{0} parameter(0)
  ROOT %everyone = f32[4]{0} all-reduce(%y), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%wrapped (z: f32[16]) -> f32[4] {
  %z = f32[16]{0} parameter(0)
  ROOT %scattered = f32[4]{0} reduce-scatter(f32[16]{0} %z), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

ENTRY %main (p: bf16[8,16], q: f32[16]) -> f32[4] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = f32[16]{0} parameter(1)
  %init = (s32[], bf16[8,16]) tuple(%zero, %p)
  %known = (s32[]) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], bf16[8,16]) while(%known), condition=%condition, body=%body
  %begun = ((f32[16]), f32[4], u32[]) async-start(%q), calls=%wrapped
  %ended = f32[4]{0} async-done(%begun), calls=%wrapped
  ROOT %choice = f32[4]{0} conditional(%which, %ended, %ended), branch_computations={%little, %much}
}
"""


def test_counts_and_bytes_through_loops_branches_and_pairs():
    turns = 3 + 5  # the trip count that XLA names, and the constant of the other loop's condition
    found = summary(collectives(HLO, MESH))
    assert found == {
        "all-gather": {
            "count": turns,
            "bytes": turns * 1024,
            "axes": {"fsdp": {"count": turns, "bytes": turns * 1024}},
        },
        "collective-permute": {
            "count": turns,
            "bytes": turns * 256,
            "axes": {"data": {"count": turns, "bytes": turns * 256}},
        },
        "reduce-scatter": {"count": 1, "bytes": 64, "axes": {"data+fsdp": {"count": 1, "bytes": 64}}},
        "all-reduce": {"count": 1, "bytes": 16, "axes": {"data+fsdp": {"count": 1, "bytes": 16}}},
    }
    assert list(found) == ["all-gather", "collective-permute", "reduce-scatter", "all-reduce"]  # most bytes first


@pytest.mark.parametrize(
    "type_, sizes",
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", [12]),
        ("(f32[], pred[7], s4[3])", [4, 7, 2]),
        ("f8e4m3fn[10]", [10]),
        ("(u32[2], token[])", [8, 0]),
    ],
)
def test_bytes_of_types(type_, sizes):
    assert bytes_of(type_) == sizes


@pytest.mark.parametrize(
    "attributes, groups, axes",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=[1,8]<=[8]", [list(range(8))], "data+fsdp"),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [[0, 1], [1, 2], [2, 3], [3, 0]], "fsdp"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
            "fsdp",
        ),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            "data",
        ),
        ("replica_groups={}", None, "data+fsdp"),
    ],
)
def test_groups_and_their_axes(attributes, groups, axes):
    found = groups_of(f"channel_id=3, {attributes}, use_global_device_ids=true")
    assert (found is None and groups is None) or np.array_equal(found, groups)
    assert axes_of(found, MESH) == axes


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    hlo = """HloModule tpu

%all-reduce-scatter.1 (z: f32[16]) -> f32[4] {
  %z = f32[16]{0} parameter(0)
  %sum = f32[16]{0} all-reduce(%z), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %kept = f32[4]{0} dynamic-slice(%sum, %place), dynamic_slice_sizes={4}
}

ENTRY %main (q: f32[16]) -> f32[4] {
  %q = f32[16]{0} parameter(0)
  ROOT %fused = f32[4]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = summary(collectives(hlo, MESH))
    assert found == {"reduce-scatter": {"count": 1, "bytes": 64, "axes": {"fsdp": {"count": 1, "bytes": 64}}}}


def test_a_group_of_one_device_sends_nothing():
    hlo = """HloModule alone

ENTRY %main (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  ROOT %same = f32[16]{0} all-reduce(%q), replica_groups=[8,1]<=[8], to_apply=%add
}
"""
    assert summary(collectives(hlo, MESH)) == {}


def test_what_hosts_send_between_slices():
    hlo = """HloModule slices

ENTRY %main (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.1_0"}
  %send = (f32[16]{0}, u32[], token[]) send(%q, %after-all), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (f32[16]{0}, u32[], token[]) recv(%after-all), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[16]{0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[16]{0} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501
    found = summary(collectives(hlo, MESH))
    assert found == {"all-reduce": {"count": 1, "bytes": 64, "axes": {"slices": {"count": 1, "bytes": 64}}}}
