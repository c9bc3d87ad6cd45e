"""``loram recover``."""

from typing import TYPE_CHECKING, Any

from loram_cli.cli.options import (
    BaseStageOptions,
    Values,
    after_push,
    before_push,
    fetched,
    layered,
    reporter_for,
    settle,
    show_plans,
)
from loram_cli.stages.recover.spec import RecoverSpec

if TYPE_CHECKING:
    from loram_cli.stages.core.plan import StagePlan

NAME = "recover"
EPILOG = "Example: loram recover --merge"
SPEC, OPTIONS = RecoverSpec, BaseStageOptions


def command(values: Values, options: BaseStageOptions) -> None:
    """Scatter the small LoRA factors back to the full model's shapes, and check them."""
    from loram_cli.cli.draw.console import print_json, show_result
    from loram_cli.config.defaults import merge_spec, recover_spec
    from loram_cli.stages.recover import merge, stage

    reporter = reporter_for(options.json_output)
    before_push(options.push)
    values = fetched(values, reporter)
    place = settle(options, reporter, at_hand=values.get("pruned") or values.get("adapter"))
    spec = recover_spec(place, layered(NAME, values))
    merging = merge_spec(place, spec)
    if options.dry_run:
        plans: list[StagePlan[Any]] = [stage.plan(spec, reporter)]
        if merging is not None:
            recovered = plans[0]
            plans.append(
                merge.plan(merging, reporter)
                if recovered.done
                else merge.plan_ahead(merging, recovered.disk_bytes)
            )
        show_plans(plans, options.json_output)
        return
    results = [stage.run(spec, reporter)]
    after_push(options.push, results[0], reporter)
    if merging is not None:
        results.append(merge.run(merging, reporter))
        after_push(options.push and f"{options.push}-merged", results[1], reporter)
    if options.json_output and merging is not None:
        print_json({result.stage: result.to_mapping() for result in results})
        return
    for result in results:
        show_result(result, options.json_output)
