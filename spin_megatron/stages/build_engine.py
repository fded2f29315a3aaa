"""build-engine: what generate loads, made from theta_t; one engine an iteration, since the opponent changes.

The built-in engine has nothing to build. Its folder still gets engine.json, so that every iteration says what answered.
"""

from spin_megatron.generation.engine import EngineSpec, Environment, eos_token_ids, provider
from spin_megatron.run.manifest import write_json
from spin_megatron.stages.context import StageContext, StageOutput


def engine_spec(context: StageContext) -> EngineSpec:
    """What the engine of this iteration is made from."""
    generate, data = context.config.generate, context.config.data
    return EngineSpec(
        model=context.layout.theta(context.iteration),
        dtype=generate.dtype,
        batch_size=generate.batch_size,
        max_prompt_tokens=data.max_prompt_tokens,
        max_new_tokens=data.max_response_tokens,
        options=generate.options,
        environment=Environment(
            generate.environment.python,
            tuple(generate.environment.prefix),
            tuple(generate.environment.launcher),
            tuple(generate.environment.variables),
        ),
        prompt_files=(context.layout.prompts, context.layout.held_out),
    )


def run(context: StageContext) -> StageOutput:
    """Build the engine of theta_t and write engine.json."""
    spec, folder = engine_spec(context), context.layout.engine(context.iteration)
    eos_ids = eos_token_ids(spec.model)  # a model that cannot end a response is refused before a long build
    facts = provider(context.config.generate.engine).build(spec, folder)
    limits = {"max_prompt_tokens": spec.max_prompt_tokens, "max_new_tokens": spec.max_new_tokens}
    record = {**facts, "dtype": spec.dtype, "limits": limits, "eos_ids": eos_ids}
    write_json(context.layout.engine_record(context.iteration), record)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return StageOutput(files=dict.fromkeys(files), summary=facts)
