# Sourced: XLA's flags for GPUs. `export XLA_FLAGS="${gpu_flags_stream[*]}"` for one GPU that streams, "${gpu_flags_train[*]}" for GPUs that
# train. Nobody has measured them yet: `bash launch/gpu-hour.sh flags` does, each of the variants below against the first.
# An unknown flag aborts JAX's start; tests/launch/test_gpu_hour.py starts it with all of them.

# shellcheck disable=SC2034  # the arrays are for whoever sources this
gpu_flags_common=(
  # Matrix products by cuBLASLt, as the plans in docs/results have them, and not by Triton code that XLA generates: under a scan that path
  # copies each layer's weights first.
  --xla_gpu_enable_triton_gemm=false
  # XLA's default: every algorithm that cuBLASLt offers for a shape is tried, and its result checked. 0 takes the first.
  --xla_gpu_autotune_level=4
)
gpu_flags_stream=("${gpu_flags_common[@]}")
gpu_flags_train=(
  "${gpu_flags_common[@]}"
  # Gathers of weights and sums of gradients beside the arithmetic of the layer before; one GPU sends nothing and is not changed by it.
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  # Two turns of the scan over layers in one, so that a layer's weights can be gathered while the one before is computed.
  --xla_gpu_enable_while_loop_double_buffering=true
)

# Variants of streaming, each to be held against gpu_flags_stream. Of a flag that is given twice the last counts.
gpu_variants=(triton graphs-off graphs-conditional)
gpu_flags_triton=("${gpu_flags_stream[@]}" --xla_gpu_enable_triton_gemm=true)
# Kernels are launched one by one, instead of as CUDA graphs.
gpu_flags_graphs_off=("${gpu_flags_stream[@]}" --xla_gpu_enable_command_buffer=)
# A step chooses between one forward and a guided one on the device; by default the host reads the choice, and waits for it.
gpu_flags_graphs_conditional=("${gpu_flags_stream[@]}" --xla_gpu_enable_command_buffer=+CONDITIONAL)
