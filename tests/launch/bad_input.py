"""Bad inputs of every entry point: arguments, and a word that the sentence about them must have.

In arguments `{root}` is the folder that `conftest` fills, and `{own}` one of the case alone. A case
is (arguments, words): with the arguments of `GOOD` before them the entry point must end with exit
code 2 and one sentence on stderr, which matches the regular expression `words`, and make nothing.
"""

import json
import os
import pathlib
import shutil
import struct

LONG = "x" * 5000
STEPS = "--config.training.budget=steps --config.training.steps"
RANK = "--config.training.lora.rank=4 --config.training.lora"
FILE = "--config.judges[0].kind=model --config.prompts[0].tasks=() --config.prompts[0].kind"

GOOD = {
    "train": (
        "--config.data.path={root}/pairs.jsonl",
        "--config.student.path={root}/model",
        "--config.workspace={own}/workspace",
        "--config.training.rows=1",
        "--config.training.row_length=128",
    ),
    "ablate": ("--config={root}/study.py", "--config.workspace={own}/workspace"),
    "export": (
        "--config={root}/study.py",
        "--config.workspace={own}/workspace",
        "--arm=a",
        "--out={own}/out.parquet",
    ),
    "recipe": (
        "--config={root}/study.py",
        "--config.workspace={own}/workspace",
        "--out={own}/out.parquet",
    ),
    "nursery": ("--config={root}/zoo.py", "--config.workspace={own}/workspace"),
    "bench_sample": (),
    "bench_train": (),
    "quantization_error": ("--model={root}/model", "--text={root}/pairs.jsonl"),
}

FLAGS = {  # entry point → (arguments, words)
    "train": [
        ("--bogus=1", r"Unknown command line flag 'bogus'"),
        ("--config.bogus=1", r"PairTraining has no field 'bogus'.*; it has .*workspace"),
        ("--config.training.step=1", r"Training has no field 'step' .*; it has .*steps"),
        ("--devices=2x4", r"only a dry run assumes devices"),
        ("--dry_run --devices=many", r"give HOSTSxDEVICES"),
        ("--dry_run --config.data.path=/nowhere.jsonl", r"/nowhere\.jsonl"),
        ("--dry_run --config.workspace=/proc/x", r"cannot be written"),
        ("word", r"'word' is no flag; flags begin with --"),
        ("--config=/nowhere.py", r"There is no config file '/nowhere\.py'"),
        ("--config={root}", r"There is no config file"),
        ("--config.training.steps=ten", r"config\.training\.steps.*ten"),
        ("--config.training.steps", r"steps"),
        (
            "--config.training.steps=0 --config.training.budget=steps",
            r"config\.training\.steps is 0",
        ),
        (f"{STEPS}=-5", r"steps is -5"),
        (
            f"--config.training.steps={10**23} --config.training.budget=steps",
            r"at most 1,000,000,000",
        ),
        ("--config.training.steps=7", r"nothing reads it"),
        ("--config.training.epochs=0", r"config\.training\.epochs is 0"),
        ("--config.training.epochs=nan", r"config\.training\.epochs is nan"),
        ("--config.training.epochs=inf", r"config\.training\.epochs is inf"),
        ("--config.training.epochs=1e30", r"at most 1,000,000"),
        ("--config.training.rows=-1", r"config\.training\.rows is -1"),
        (f"--config.training.rows={2**40}", r"config\.training\.rows is .*fits no device"),
        ("--config.training.rows=16777216 --config.training.row_length=16777216", r"31 bits"),
        ("--config.training.row_length=-1", r"config\.training\.row_length is -1"),
        (f"--config.training.row_length={10**12}", r"row_length is .*at most 16,777,216"),
        ("--config.training.pairs_per_step=0", r"pairs_per_step is 0"),
        (f"--config.training.pairs_per_step={10**18}", r"pairs_per_step is .*at most"),
        ("--config.training.checkpoint_every=0", r"checkpoint_every is 0"),
        ("--config.training.keep_checkpoints=0", r"keep_checkpoints is 0"),
        ("--config.training.warmup=2", r"warmup is 2"),
        ("--config.training.warmup=-0.1", r"warmup is -0\.1"),
        ("--config.training.schedule=step", r"choose one of 'linear'"),
        ("--config.training.clip=0", r"clip is 0"),
        ("--config.training.clip=nan", r"clip is nan"),
        ("--config.training.weight_decay=-1", r"weight_decay is -1"),
        ("--config.training.weight_decay=1e300", r"weight_decay is 1e\+300"),
        ("--config.training.remat=all", r"choose one of 'auto', 'none'"),
        ("--config.training.moments=int8", r"choose one of 'float32'"),
        ("--config.training.offload_moments=maybe", r"offload_moments"),
        ("--config.training.budget=hours", r"choose one of 'steps'"),
        ("--config.training.over_length=cut", r"choose one of 'error'"),
        ("--config.training.finishes=()", r"finishes"),
        ("--config.training.lora.rank=-1", r"rank is -1"),
        (f"--config.training.lora.rank={10**9}", r"rank is 1000000000.*at most 65,536"),
        (f"{RANK}.alpha=0", r"alpha is 0"),
        (
            f"{RANK}.targets=('x',)",
            r"'x'; choose one of",
        ),
        ("--config.objective.kind=ppo", r"choose one of 'dpo'"),
        ("--config.objective.beta=0", r"beta .*is 0"),
        ("--config.objective.beta=-1", r"beta .*is -1"),
        ("--config.objective.beta=1e200", r"beta .*is 1e\+200"),
        ("--config.objective.beta=nan", r"beta .*is nan"),
        ("--config.objective.learning_rate=-1", r"learning_rate .*is -1"),
        ("--config.objective.learning_rate=inf", r"learning_rate .*is inf"),
        ("--config.objective.learning_rate=1e100", r"learning_rate .*is 1e\+100"),
        ("--config.objective.label_smoothing=0.1", r"label_smoothing"),
        (
            "--config.objective.kind=robust --config.objective.label_smoothing=0.7",
            r"at most 0\.4999",
        ),
        ("--config.objective.gamma=2", r"gamma"),
        ("--config.objective.baseline_fraction=0", r"baseline_fraction"),
        ("--config.objective.kind=kto --config.objective.desirable_weight=-1", r"desirable_weight"),
        ("--config.seed=-1", r"config\.seed is -1"),
        (f"--config.seed={2**63}", r"config\.seed is .*63 bits"),
        (f"--config.seed={10**400}", r"config\.seed is .*63 bits"),
        ("--config.name=", r"config\.name is empty"),
        ("--config.name=..", r"of no use as a name"),
        ("--config.name=a\x1b[31mb", r"control character"),
        ("--config.name=" + LONG, r"of no use as a name"),
        ("--config.workspace=", r"config\.workspace is empty"),
        ("--config.workspace=s3://bucket/x", r"no bucket of Google Cloud Storage"),
        ("--config.workspace={root}/pairs.jsonl", r"cannot be written|Not a directory"),
        ("--config.workspace=/proc/workspace", r"cannot be written"),
        ("--config.workspace=/" + LONG, r"cannot be written"),
        ("--config.student.path=", r"config\.student\.path is empty"),
        ("--config.student.path=/nowhere", r"There is no model at /nowhere"),
        ("--config.student.path={root}/pairs.jsonl", r"GGUF"),
        ("--config.student.path={root}", r"config\.json|safetensors"),
        ("--config.student.path=" + LONG, r"There is no model at"),
        ("--config.student.path=no/such", r"Nothing of the hub's model 'no/such'"),
        ("--config.student.dtype=fp8", r"choose one of 'float32'"),
        ("--config.student.quantization=fp8", r"generators and judges alone may be quantised"),
        ("--config.reference.path=/nowhere", r"There is no model at /nowhere"),
        ("--config.reference.dtype=bfloat16", r"nothing reads it"),
        ("--config.objective.kind=sft --config.reference.path={root}/model", r"has no reference"),
        ("--config.table=/nowhere", r"/nowhere"),
        ("--config.table={root}/pairs.jsonl", r"pairs\.jsonl"),
        ("--config.table={root}/empty", r"empty"),
        (
            "--config.objective.kind=simpo --config.objective.beta=2 --config.table=x",
            r"no reference",
        ),
        ("--config.trackers=('mlflow',)", r"choose one of 'tensorboard'"),
        ("--config.training.mesh.data=3", r"config\.training\.mesh is data=3"),
        ("--config.training.mesh.data=-2", r"config\.training\.mesh is"),
        (
            "--config.training.mesh.data=-1 --config.training.mesh.fsdp=-1",
            r"at most one is -1",
        ),
        (
            f"--config.training.mesh.tensor={10**15}",
            r"config\.training\.mesh\.tensor is .*devices",
        ),
        ("--config.training.mesh.context=3", r"row_length is 128"),
        ("--config.mesh.data=2", r"PairTraining has no field 'mesh'"),
        ("--config.data.path=", r"config\.data\.path is empty"),
        ("--config.data.path=/nowhere.jsonl", r"/nowhere\.jsonl"),
        ("--config.data.path={root}/empty", r"empty"),
        ("--config.data.path={root}/model", r"model"),
        ("--config.data.path=no/such", r"no/such"),
        ("--config.data.path=" + LONG, r"xxx"),
        ("--config.data.split=test --config.data.path={root}/empty", r"empty"),
        ("--config.data.split=test", r"nothing reads it, for config\.data\.path names a file"),
        ("--config.data.workers=-1", r"workers is -1"),
        (f"--config.data.workers={10**9}", r"workers is .*at most 1,024"),
        ("--config.data.truncation_mode=middle", r"choose one of 'keep_start'"),
        ("--config.data.truncation_mode=keep_end", r"nothing reads it"),
        ("--profile_steps=9", r"--profile_steps is '9'"),
        ("--profile_steps=5:3", r"--profile_steps is '5:3'"),
        ("--profile_steps=0:3", r"--profile_steps is '0:3'"),
    ],
    "ablate": [
        ("--bogus", r"Unknown command line flag 'bogus'"),
        ("--config.arms[9].keep=top", r"items count from 0"),
        ("--config.arms[b].keep=top", r"there is no 'b' in config\.arms; it has \[a\]"),
        ("--config.arms[].keep=top", r"there is no '' in config\.arms; it has \[a\]"),
        ("--config.arms[a].bogus=1", r"arms\[a\]\.bogus=1: Arm has no field 'bogus'"),
        ("--config.arms[a].keep=best", r"keep of arm 'a' is 'best'; choose one of 'all'"),
        ("--config.arms[a].fraction=half", r"arms\[a\]\.fraction=half: it must be a number"),
        ("--config.arms[a].seeds=1.5", r"seeds"),
        ("--config.arms[a].seeds[x]=1", r"there is no 'x' in config\.arms\[a\]\.seeds"),
        ("--config.arms[a]=1", r"config\.arms\[a\] is no single value; set one of its name"),
        ("--config.arms[a.keep=top", r"is no path to a field"),
        ("--config.arms[a]keep=top", r"is no path to a field"),
        ("--config.arms.a.keep=top", r"config\.arms is a list; it has \[a\]"),
        ("--config.arms.count=2", r"config\.arms is a list"),
        ("--config.prompts[easy].count=4", r"its items have no names"),
        ("--config.training[a].steps=4", r"config\.training is no list"),
        ("--config.student={root}/model", r"config\.student is no single value"),
        ("--config.judges[exact].noise=-1", r"noise"),
        ("--config.suites[s].prompts.count=0", r"suites\[0\]\.prompts\.count is 0"),
        ("--only=b", r"--only has 'b', which matches no arm; the study has 'a'\."),
        ("--only=a,", r"--only has '', which matches no arm"),
        ("--only=[", r"--only has '\[', which matches no arm"),
        ("--only=b --dry_run", r"--only has 'b'"),
        ("--only", r"only"),
        ("--all_rows=7", r"all_rows"),
        ("--dry_run=rows", r"dry_run"),
        ("--dry_run --config.student.path=/nowhere", r"There is no model at /nowhere"),
        (
            "--dry_run --config.sampling.max_prompt=4 --config.workspace={own}/none",
            r"longest prompt of \S+ has \d+ tokens .*max_prompt is 4; raise it",
        ),
        ("--config.arms[0].bogus=1", r"Arm has no field 'bogus'"),
        ("--config.bogus=1", r"Experiment has no field 'bogus'"),
        ("--config.arms[0].keep=best", r"choose one of 'all'"),
        ("--config.arms[0].chosen=nobody", r"'nobody'; choose one of"),
        ("--config.arms[0].fraction=2", r"fraction of arm 'a' is 2"),
        ("--config.arms[0].fraction=0", r"fraction of arm 'a' is 0"),
        ("--config.arms[0].objective=none", r"'none'; choose one of"),
        ("--config.arms[0].seeds=()", r"seeds of arm 'a'"),
        ("--config.arms[0].seeds=(-1,)", r"seeds of arm 'a'"),
        (f"--config.arms[0].seeds=({2**70},)", r"63 bits"),
        ("--config.arms[0].name=a/b", r"slash"),
        ("--config.arms[0].direction=dice", r"'dice'; choose one of"),
        ("--config.arms[0].judge=me --config.arms[0].keep=top", r"'me'; choose one of"),
        ("--config.arms[0].stratum=wrong", r"choose one of 'any'"),
        ("--config.prompts[0].kind=csv", r"choose one of 'synthetic'"),
        ("--config.prompts[0].count=0", r"count is 0"),
        (f"--config.prompts[0].count={10**15}", r"count is .*at most 100,000,000"),
        ("--config.prompts[0].difficulty=0", r"difficulty is 0"),
        (f"--config.prompts[0].difficulty={10**9}", r"difficulty is .*at most 100"),
        ("--config.prompts[0].tasks=()", r"tasks is empty"),
        ("--config.prompts[0].tasks=('nothing',)", r"nothing"),
        ("--config.prompts[0].seed=-1", r"seed is -1"),
        ("--config.prompts[0].kind=jsonl", r"path is empty"),
        (
            "--config.prompts[0].tasks=() --config.prompts[0].kind=jsonl "
            "--config.prompts[0].path={root}/study.py",
            r"exact and needs",
        ),
        (f"{FILE}=jsonl --config.prompts[0].path=/nowhere.jsonl", r"/nowhere\.jsonl"),
        (f"{FILE}=parquet --config.prompts[0].path={{root}}/pairs.jsonl", r"pairs\.jsonl"),
        (f"{FILE}=tfds --config.prompts[0].path=/nowhere", r"/nowhere|tensorflow"),
        (f"{FILE}=jsonl --config.prompts[0].path=" + LONG, r"There is nothing at xxx"),
        ("--config.prompts[0].checker=regex", r"choose one of ''"),
        ("--config.generators[0].samples=0", r"samples of generator 'weak' is 0"),
        (f"--config.generators[0].samples={10**12}", r"at most 1,000,000"),
        ("--config.generators[0].temperature=-1", r"temperature"),
        ("--config.generators[0].temperature=nan", r"temperature"),
        ("--config.generators[0].top_p=0", r"top_p"),
        ("--config.generators[0].top_p=1.5", r"top_p"),
        (f"--config.generators[0].top_k={10**12}", r"top_k"),
        ("--config.generators[0].name=strong", r"Two generators are named 'strong'"),
        ("--config.generators[0].name=", r"A generator has no name"),
        ("--config.generators[0].name=we\x07ak", r"control character"),
        ("--config.generators[0].model.path=/nowhere", r"There is no model at /nowhere"),
        ("--config.generators[0].model.dtype=int4", r"choose one of 'float32'"),
        ("--config.generators[0].model.quantization=int4", r"choose one of '', 'int8', 'fp8'"),
        ("--config.student.quantization=int8", r"generators and judges alone may be quantised"),
        ("--config.reference.quantization=int8", r"generators and judges alone may be quantised"),
        ("--config.judges[0].kind=human", r"choose one of 'exact'"),
        ("--config.judges[0].noise=-1", r"noise"),
        ("--config.judges[0].noise=1e300", r"noise"),
        ("--config.judges[0].dimensions=()", r"no dimensions"),
        ("--config.judges[0].dimensions=('style',)", r"'style'; choose one of"),
        ("--config.suites[0].samples=0", r"samples is 0"),
        (f"--config.suites[0].samples={10**10}", r"samples is .*at most 1,000,000"),
        ("--config.suites[0].domain=middle", r"choose one of 'in'"),
        ("--config.suites[0].temperature=inf", r"temperature is inf"),
        ("--config.suites[0].prompts.tasks=('nothing',)", r"nothing"),
        ("--config.sampling.max_prompt=0", r"max_prompt is 0"),
        (f"--config.sampling.max_tokens={10**12}", r"max_tokens is .*fits no device"),
        ("--config.sampling.max_tokens=100000", r"positions"),
        (f"--config.sampling.slots={10**9}", r"slots is .*fits no device"),
        ("--config.sampling.slots=0", r"slots is 0"),
        ("--config.sampling.chunk=0", r"chunk is 0"),
        ("--config.sampling.shard=0", r"shard is 0"),
        ("--config.sampling.stop=('',)", r"empty string"),
        ("--config.scoring.rows=-1", r"config\.scoring\.rows is -1"),
        (f"--config.scoring.row_length={10**12}", r"config\.scoring\.row_length is"),
        ("--config.scoring.shard=-2", r"shard is -2"),
        ("--config.training.steps=-1", r"steps is -1"),
        (f"--config.training.steps={10**23}", r"at most 1,000,000,000"),
        ("--config.training.mesh.data=5", r"config\.training\.mesh is data=5"),
        ("--config.scoring.mesh.fsdp=5", r"config\.scoring\.mesh is fsdp=5"),
        ("--config.sampling.mesh.fsdp=16", r"config\.sampling\.mesh is fsdp=16 .* nearest"),
        ("--config.generators[0].mesh.tensor=3", r"config\.generators\[0\]\.mesh is tensor=3"),
        ("--config.sampling.mesh.context=2", r"decoding has no rows to split"),
        ("--config.mesh.data=2", r"Experiment has no field 'mesh'"),
        ("--devices=2x4", r"only a dry run assumes devices"),
        ("--dry_run --devices=many", r"give HOSTSxDEVICES"),
        ("--dry_run --devices=2x0", r"give HOSTSxDEVICES"),
        ("--config.student.path=/nowhere", r"There is no model at /nowhere"),
        ("--config.table=/nowhere", r"/nowhere"),
        ("--config.workspace=/proc/x", r"cannot be written"),
        ("--config.name=", r"config\.name is empty"),
        ("--config={root}/train.py", r"gives PairTraining where Experiment is needed"),
        ("--profile_steps=x", r"--profile_steps is 'x'"),
    ],
    "export": [
        ("--arm=nobody", r"--arm is 'nobody'; choose one of 'a'"),
        ("--arm=", r"--arm is ''; choose one of 'a'"),
        ("--out={own}/out.csv", r"neither \.parquet nor \.jsonl"),
        ("--out=/nowhere/out.parquet", r"/nowhere"),
        ("--ids=maybe", r"maybe"),
        ("--config.workspace=/nowhere", r"not in /nowhere; run launch\.ablate"),
        ("--out={own}/new.parquet", r"are not in .*workspace; run launch\.ablate"),
        ("--config={root}/train.py", r"gives PairTraining where Experiment is needed"),
    ],
    "recipe": [
        ("--out={own}/out.csv", r"neither \.parquet nor \.jsonl"),
        ("--config={root}/train.py", r"gives PairTraining where Experiment is needed"),
        ("--config.generators=()", r"has 0 generators, and a pair needs"),
        ("--config.suites=()", r"config\.suites is empty"),
        ("--traces=0", r"--traces|traces"),
        ("--traces=1 --flops=2", r"give one budget"),
        ("--traces=2", r"--traces is 2, and 2 prompts, .*, need 4 traces .*; raise it"),
        ("--traces=9", r"all 4 prompts of the config need 8 traces at most; lower it"),
        ("--flops=1e5", r"--flops is 100000, .* beside .* for capability, audits and"),
        ("--flops=1e30", r"prompts of the config need .* FLOPs at most"),
        ("--study={own}", r"no summary\.json; give the folder"),
        ("--study={root}/model/config.json", r"config\.json is not the summary\.json of a study"),
        ("--config.sampling.max_prompt=3", r"config\.sampling\.max_prompt is 3; raise it"),
        ("--config.student.path= --config.generators[1].model.path=", r"student\.path is empty"),
    ],
    "nursery": [
        ("--config={root}/study.py", r"gives Experiment where ModelZoo is needed"),
        ("--config.workspace=gs://x/y", r"needs a folder on this machine"),
        ("--config.workspace=", r"config\.workspace is empty"),
        ("--config.output=", r"config\.output is empty"),
        ("--config.output={root}/pairs.jsonl/x --measure_only", r"pairs\.jsonl/x"),
        ("--config.output=/proc/x --measure_only", r"/proc/x cannot be written"),
        ("--config.vocab=3", r"config\.vocab is 3"),
        (f"--config.vocab={10**12}", r"config\.vocab is"),
        ("--config.models=()", r"config\.models is empty"),
        ("--config.models[0].tasks=()", r"tasks or difficulties"),
        ("--config.models[0].tasks=('nothing',)", r"nothing"),
        ("--config.models[0].difficulties=(0,)", r"difficulties of model 'oak'"),
        (f"--config.models[0].difficulties=({10**9},)", r"difficulties of model 'oak'"),
        ("--config.models[0].error_rate=2", r"error_rate"),
        ("--config.models[0].layers=0", r"layers of model 'oak' is 0"),
        (f"--config.models[0].width={10**9}", r"width of model 'oak' is"),
        ("--config.models[0].heads=3", r"heads of model 'oak' is 3"),
        (f"--config.models[0].steps={10**23}", r"steps of model 'oak' is"),
        ("--config.models[0].row_length=5000", r"row_length of model 'oak' is 5000"),
        ("--config.models[0].learning_rate=nan", r"learning_rate of model 'oak' is nan"),
        ("--config.models[0].seed=-1", r"seed of model 'oak' is -1"),
        ("--config.models[0].curriculum=play", r"choose one of 'solve'"),
        ("--config.models[0].base=elm", r"base of model 'oak'"),
        ("--config.models[0].name=", r"A model has no name"),
        ("--config.release=('elm',)", r"'elm'; choose one of 'oak'"),
        ("--config.mesh.data=-2", r"config\.mesh is"),
        ("--config.sampling.slots=0", r"slots is 0"),
    ],
    "bench_sample": [
        ("--slots=0", r"--slots"),
        (f"--slots={10**12}", r"--slots"),
        ("--chunk=0", r"--chunk"),
        ("--prompts=0", r"--prompts"),
        (f"--samples={10**12}", r"--samples"),
        ("--max_prompt=-1", r"--max_prompt"),
        (f"--max_tokens={10**12}", r"--max_tokens"),
        ("--top_p=0", r"--top_p"),
        ("--top_p=1.5", r"--top_p"),
        ("--layers=0", r"--layers"),
        ("--width=12", r"--width is 12"),
        (f"--width={10**12}", r"--width"),
        ("--vocab=0", r"--vocab"),
        ("--quantization=int4", r"--quantization=int4"),
        ("--dtype=fp8", r"--dtype=fp8"),
        ("--model=/nowhere", r"There is no model at /nowhere"),
        ("--output=/nowhere/x.json", r"--output=/nowhere/x\.json"),
        ("word", r"'word' is no flag"),
    ],
    "quantization_error": [
        ("--model=/nowhere", r"There is no model at /nowhere"),
        ("--text=/nowhere", r"--text is '/nowhere' and there is no such file"),
        ("--length=30000", r"tokens, and --length is 30000; name a longer text"),
        ("--quantization=int4", r"--quantization=int4"),
        ("--dtype=int8", r"--dtype=int8"),
        ("--length=1", r"--length"),
        ("--problems=-1", r"--problems"),
        ("--row_length=0", r"--row_length"),
        ("--output=/nowhere/x.json", r"--output=/nowhere/x\.json"),
    ],
    "bench_train": [
        ("--kinds=ppo", r"--kinds is 'ppo'"),
        ("--shapes=normal", r"--shapes is 'normal'"),
        ("--only=verl", r"--only is 'verl'"),
        ("--steps=1", r"--steps"),
        ("--rounds=0", r"--rounds"),
        ("--pairs=0", r"--pairs"),
        (f"--pairs={10**12}", r"--pairs"),
        ("--scale=0", r"--scale"),
        ("--rows=0", r"--rows"),
        ("--remat=all", r"--remat=all"),
        ("--dtype=fp8", r"--dtype=fp8"),
        ("--tunix_remat=SOME", r"--tunix_remat=SOME"),
        ("--layers=0", r"--layers"),
        ("--width=129", r"--width is 129"),
        ("--vocab=1", r"--vocab is 1"),
        ("--trl=/nowhere/python", r"--trl is '/nowhere/python'"),
        ("--tunix={root}", r"--tunix is"),
        ("--output={root}", r"--output"),
    ],
}

CONFIGS = {  # text of a config file → words
    "import sys; sys.exit(3)": r"config .*line 1.*SystemExit",
    "def get_config(): raise SystemExit": r"cannot be loaded",
    "def get_config(): exit('enough')": r"cannot be loaded \(SystemExit: enough\)",
    "def get_config(: pass": r"line 1.*SyntaxError",
    "import no_such_module": r"no_such_module",
    "x = 1": r"get_config",
    "get_config = 3": r"cannot be loaded",
    "def get_config(): return None": r"NoneType|None",
    "def get_config(): return 3": r"int",
    "def get_config(): return {'name': 'x'}": r"dict|KeyError",
    "def get_config(): 1/0": r"ZeroDivisionError",
    "def get_config(a): return a": r"TypeError",
    "raise BaseException('odd')": r"odd",
    "\0": r"cannot be loaded",
    "": r"get_config",
}


def _edit(**fields):
    def edit(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in (config | fields).items() if v != "gone"}))

    return edit


def _write(name, data):
    def edit(folder):
        file = folder / name
        file.unlink(missing_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())

    return edit


def _cut(name, share):
    def edit(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return edit


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _header(change):
    """Changes the header of model.safetensors, which holds names, dtypes and shapes."""

    def edit(folder):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return edit


def _rename(header):
    header["model.norm.bias"] = header.pop("model.norm.weight")


def _swap(header):
    tensor = header["model.layers.0.mlp.up_proj.weight"]
    tensor["shape"] = tensor["shape"][::-1]


def _folder_for(name):
    def edit(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


INDEX = "model.safetensors.index.json"
MODELS = {  # name: (change to a good model folder, words)
    "no config": (_remove("config.json"), r"has no config\.json"),
    "no weights": (_remove("model.safetensors"), r"has no safetensors"),
    "no tokenizer": (
        lambda folder: [(folder / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")],
        r"has no tokenizer\.json",
    ),
    "config cut": (_cut("config.json", 0.5), r"cannot be read"),
    "config empty": (_write("config.json", ""), r"cannot be read"),
    "config list": (_write("config.json", "[1]"), r"no JSON object"),
    "config null": (_write("config.json", "null"), r"no JSON object"),
    "config binary": (_write("config.json", b"\xff\xfe\x00"), r"cannot be read"),
    "config folder": (_folder_for("config.json"), r"config\.json"),
    "config deep": (_write("config.json", "[" * 100_000), r"cannot be read"),
    "weights cut": (_cut("model.safetensors", 0.5), r"cannot be read"),
    "weights empty": (_write("model.safetensors", b""), r"cannot be read"),
    "weights text": (_write("model.safetensors", "version https://git-lfs"), r"cannot be read"),
    "weights folder": (_folder_for("model.safetensors"), r"cannot be read"),
    "weights renamed": (_header(_rename), r"has no tensor 'model\.norm\.weight'"),
    "weights transposed": (_header(_swap), r"up_proj\.weight .*has the shape"),
    "weights header": (_write("model.safetensors", struct.pack("<Q", 2**60)), r"cannot be read"),
    "index cut": (_write(INDEX, '{"weight_map": {'), r"The index .*cannot be read"),
    "index list": (_write(INDEX, "[]"), r"The index .*cannot be read"),
    "index without map": (_write(INDEX, "{}"), r"The index .*cannot be read"),
    "index numbers": (_write(INDEX, '{"weight_map": {"a": 3}}'), r"The index .*cannot be read"),
    "index of missing": (
        _write(INDEX, '{"weight_map": {"a": "b.safetensors"}}'),
        r"has model\.safetensors and model\.safetensors\.index\.json",
    ),
    "tokenizer cut": (_cut("tokenizer.json", 0.5), r"The tokenizer in .*cannot be read"),
    "tokenizer empty": (_write("tokenizer.json", "{}"), r"The tokenizer in .*cannot be read"),
    "tokenizer null": (_write("tokenizer.json", "null"), r"The tokenizer in .*cannot be read"),
    "generation list": (_write("generation_config.json", "[]"), r"generation_config\.json"),
    "generation ends": (
        _write("generation_config.json", '{"eos_token_id": ["</s>"]}'),
        r"eos_token_id '</s>'",
    ),
    "generation end": (
        _write("generation_config.json", '{"eos_token_id": -4}'),
        r"eos_token_id -4",
    ),
    "kind": (_edit(model_type="mamba"), r"model_type is 'mamba'"),
    "kind list": (_edit(model_type=["llama"]), r"model_type is \['llama'\]"),
    "kind gone": (_edit(model_type="gone"), r"model_type is ''"),
    "width text": (_edit(hidden_size="32"), r"hidden_size is '32'"),
    "width zero": (_edit(hidden_size=0), r"hidden_size is 0"),
    "width null": (_edit(hidden_size=None), r"has no hidden_size"),
    "width gone": (_edit(hidden_size="gone"), r"has no hidden_size"),
    "width other": (_edit(hidden_size=64), r"has the shape"),
    "width float": (_edit(hidden_size=32.5), r"hidden_size is 32\.5"),
    "vocab negative": (_edit(vocab_size=-5), r"vocab_size is -5"),
    "vocab other": (_edit(vocab_size=77), r"has the shape"),
    "vocab huge": (_edit(vocab_size=10**15), r"vocab_size is 10000"),
    "layers huge": (_edit(num_hidden_layers=10**12), r"num_hidden_layers is"),
    "layers more": (_edit(num_hidden_layers=3), r"has no tensor"),
    "layers less": (_edit(num_hidden_layers=1), r"tensors that its config\.json does not call for"),
    "layers true": (_edit(num_hidden_layers=True), r"num_hidden_layers is True"),
    "heads zero": (_edit(num_attention_heads=0), r"num_attention_heads is 0"),
    "heads odd": (_edit(num_attention_heads=3), r"heads is 3"),
    "kv heads": (_edit(num_key_value_heads=3), r"multiple of num_key_value_heads"),
    "kv heads text": (_edit(num_key_value_heads="2"), r"num_key_value_heads is '2'"),
    "head width odd": (_edit(head_dim=7), r"head_dim is 7"),
    "mlp other": (_edit(intermediate_size=65), r"has the shape"),
    "mlp list": (_edit(intermediate_size=[64]), r"intermediate_size is \[64\]"),
    "positions": (_edit(max_position_embeddings="2k"), r"max_position_embeddings is '2k'"),
    "eps": (_edit(rms_norm_eps="small"), r"rms_norm_eps is 'small'"),
    "eps negative": (_edit(rms_norm_eps=-1e-5), r"rms_norm_eps is -1e-05"),
    "theta": (_edit(rope_parameters={"rope_theta": "big"}), r"rope_theta is 'big'"),
    "rope list": (_edit(rope_parameters=[1]), r"rope_parameters is \[1\]"),
    "rope kind": (_edit(rope_parameters={"rope_type": "yarn"}), r"factor"),
    "bias": (_edit(attention_bias=True), r"q_proj\.bias"),
    "activation": (_edit(hidden_act="gelu"), r"hidden_act is 'gelu'"),
}
JINJA = {  # chat_template.jinja of a study's models: words
    "{% for m in messages %}": r"template",
    "{{ messages[0]['content'] ": r"template",
    "{{ raise_exception('no') }}": r"template",
    "{{ messages.nothing() }}": r"template",
    "": r"template",
    "{% include '/etc/passwd' %}": r"template",
    "{{ ''.__class__.__mro__ }}": r"template",
    "always the same": r"template",
}
GGUF = {  # bytes of a .gguf file: words
    b"": r"GGUF",
    b"GGUF": r"GGUF",
    b"GGUF\x03\x00\x00\x00" + b"\xff" * 64: r"GGUF",
    b"PK\x03\x04" + b"\0" * 100: r"GGUF",
}

PAIR = {"prompt": "How many?", "chosen": " Two.", "rejected": " Three."}
PAIRS = {  # lines of pairs.jsonl: words
    "": r"pairs\.jsonl",
    "\n\n": r"pairs\.jsonl",
    "{": r"pairs\.jsonl",
    "3": r"pairs\.jsonl",
    "[]": r"pairs\.jsonl",
    "null": r"pairs\.jsonl",
    "{}": r"pairs\.jsonl|columns",
    json.dumps({"a": 1}): r"columns|pairs\.jsonl",
    json.dumps({"prompt": "x", "chosen": "y"}): r"rejected|columns",
    json.dumps(PAIR | {"chosen": None}): r"chosen",
    json.dumps(PAIR | {"chosen": 7}): r"chosen",
    json.dumps(PAIR | {"prompt": []}): r"prompt|[Ll]ine 1",
    json.dumps(PAIR | {"chosen": [{"role": "assistant"}]}): r"[Ll]ine 1|content",
    json.dumps(PAIR | {"chosen": [{"content": "x"}]}): r"[Ll]ine 1|role",
    json.dumps(PAIR | {"chosen": {"x": [1]}}): r"chosen|[Ll]ine 1",
    json.dumps(PAIR) + "\n{bad": r"[Ll]ine 2",
    json.dumps(PAIR) + "\n" + json.dumps({"prompt": "x"}): r"[Ll]ine 2",
    json.dumps({"prompt": "x", "completion": "y"}): r"label|columns",
    json.dumps({"prompt": "x", "completion": "y", "label": "good"}): r"label",
    json.dumps({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": ["a"]}): r"rejected_ids",
    json.dumps(
        {"prompt_ids": [1], "chosen_ids": [-2], "rejected_ids": [3]}
    ): r"chosen_ids|token id",
    json.dumps({"prompt_ids": [1], "chosen_ids": [10**9], "rejected_ids": [3]}): r"chosen_ids",
    json.dumps({"prompt_ids": [1], "chosen_ids": [10**30], "rejected_ids": [3]}): r"[Ll]ine 1|ids",
    json.dumps({"prompt_ids": [1], "chosen_ids": [[2]], "rejected_ids": [3]}): r"chosen_ids|ids",
}


def broken_model(good: pathlib.Path, folder: pathlib.Path, name: str) -> pathlib.Path:
    """A copy of the model folder `good` with the change of that name."""
    shutil.copytree(good, folder)
    for file in folder.iterdir():
        os.chmod(file, 0o644)
    MODELS[name][0](folder)
    return folder
