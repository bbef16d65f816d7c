# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""All rules, in the order in which a user would correct violations, and how they are applied.

Each rule is a small function whose parameters name the values that it checks: options by the last part of their name,
and values that :func:`findings` and :func:`~nemo_ptq.plan.rules.gathering.gather` add to them. It returns one line that
gives the value, the rule and the fix, or None. A rule is skipped when a value that it checks already has a problem of
its own, so that one mistake gives one line.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nemo_ptq.plan.rules import (
    data,
    exclusions,
    format_limits,
    layerwise,
    mixed_precision,
    model,
    parallelism,
    paths,
    quantization_limits,
    saved_calibration,
    tokenizer,
)
from nemo_ptq.plan.rules.gathering import with_derived

Rule = Callable[..., str | None]

RULES: tuple[Rule, ...] = (
    paths.checkpoint_is_named,
    paths.checkpoint_is_self_contained,
    model.adapter_fits,
    model.family_is_supported,
    format_limits.family_has_class,
    format_limits.formats_know_model,
    model.state_spaces_have_a_format,
    model.state_spaces_are_calibrated_here,
    model.long_rope_has_a_format,
    model.norm_fits_decoder,
    model.reader_knows_layers,
    model.class_knows_layers,
    paths.tokenizer_exists,
    tokenizer.tokenizer_is_given,
    tokenizer.tokens_have_rows,
    paths.tracker_is_known,
    parallelism.ranks_are_enough,
    parallelism.devices_match,
    parallelism.calibration_tp_divides,
    parallelism.stages_are_whole,
    parallelism.experts_divide,
    parallelism.experts_are_sharded_once,
    format_limits.experts_have_a_format,
    quantization_limits.algorithm_file_is_config,
    quantization_limits.algorithm_file_fits_model,
    quantization_limits.algorithm_file_fits_formats,
    quantization_limits.algorithm_file_fits_sizes,
    quantization_limits.kv_cache_has_algorithm,
    quantization_limits.loop_has_something_to_calibrate,
    exclusions.excluded_layers_exist,
    exclusions.kv_cache_alone_is_possible,
    quantization_limits.quality_is_available,
    mixed_precision.bits_go_with_auto,
    mixed_precision.formats_mix,
    mixed_precision.choice_is_rounded_balanced,
    mixed_precision.bits_are_reachable,
    layerwise.layerwise_is_possible,
    format_limits.kv_cache_has_layers,
    format_limits.kv_cache_has_a_format,
    saved_calibration.model_is_quantized_once,
    saved_calibration.state_is_of_the_model,
    saved_calibration.state_is_as_it_was_made,
    saved_calibration.state_is_whole,
    saved_calibration.state_is_repeatable,
    saved_calibration.rounded_weights_are_there,
    mixed_precision.state_goes_into_formats,
    saved_calibration.state_leaves_no_data_to_run,
    quantization_limits.awq_blocks_fit_calibration,
    data.data_is_readable,
    data.positions_suffice,
    data.recovery_is_measured,
    format_limits.formats_carry_algorithm,
    format_limits.server_loads_it,
    format_limits.compressed_tensors_folds_again,
    exclusions.excluded_layers_can_be_named,
    format_limits.formats_have_parallelism,
    format_limits.nemo_is_stored_in_bfloat16,
    parallelism.inference_tp_divides,
    parallelism.inference_pp_divides,
    quantization_limits.awq_blocks_fit_inference,
    quantization_limits.nvfp4_blocks_fit,
    paths.output_is_apart,
    paths.output_can_be_renamed,
    paths.output_is_not_in_use,
    paths.output_is_free,
    layerwise.leftover_is_wanted,
    paths.output_is_writable,
)


def findings(values: Mapping[str, Any]) -> Iterator[tuple[Rule, str | None]]:
    """Applies each rule for which all values are there.

    Args:
        values: The values to check, by the names of the rules' parameters.

    Yields:
        Each such rule, and its problem if it is broken.
    """
    values = with_derived(values)
    for rule in RULES:
        names = inspect.signature(rule).parameters
        if names.keys() <= values.keys():
            yield rule, rule(**{name: values[name] for name in names})
