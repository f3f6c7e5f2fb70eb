"""What a page shows, as dataclasses; `summary.summarise` computes it.

Accuracies are in percent, and their changes and differences in percentage points. A number that is
undefined is NaN, which `summary.json` writes as null. The keys of `summary.json` are the fields,
except that a field marked MERGED gives its own keys to the object that contains it.
"""

from dataclasses import dataclass, field

from deltapref_jax.analysis.statistics import Estimate, GapBin
from deltapref_jax.config import Arm

ByDomain = dict[str, Estimate]  # "in", "out"
MERGED = {"merged": True}
"""Metadata of a field whose keys, a mapping's or a dataclass's, join its parent's in the JSON."""


@dataclass
class Evaluation:
    """Answers of one model to the suites."""

    accuracy: ByDomain = field(metadata=MERGED)
    truncated: float  # percent of answers cut at the token limit
    tokens: float  # mean length


@dataclass
class GeneratorSummary:
    """A generator's traces of the training prompts, and its evaluation."""

    name: str
    about: str
    traces: int
    train_truncated: float  # percent
    train_tokens: float  # mean length
    train_correct: float  # percent; NaN where no answer was checked
    evaluation: Evaluation | None = field(metadata=MERGED)


@dataclass
class SuiteSummary:
    """One evaluation suite."""

    suite: str
    domain: str
    questions: int
    example: str  # its first question
    samples: int  # per question
    accuracy: dict[str, float]  # "student" and generators


@dataclass
class ArmChange:
    """An arm's change against the student before training, in one domain."""

    change: Estimate
    p: float
    p_holm: float  # adjusted over the arms of the domain
    p_bh: float


@dataclass
class TrainingSummary:
    """Means over the last quarter of the steps of all seeds; NaN where a metric was not written."""

    steps: int | None
    loss: float
    grad_norm: float
    accuracy: float  # share of pairs whose chosen trace has the larger reward
    margin: float
    kl: float  # KTO's baseline
    chosen: float  # log-probability minus the reference's, nats per trace
    rejected: float
    falling: bool  # both are below 0


@dataclass
class ArmSummary:
    """One arm: config, pairs, training and evaluation."""

    arm: Arm = field(metadata=MERGED)  # `seeds` below replaces the config's in the JSON
    kind: str  # of its objective
    seeds: int  # evaluated
    pair_judge: str  # judge whose ratings shaped its pairs; "" if none did
    generator_delta: ByDomain | None  # None where a generator was not evaluated
    sample_delta: dict[str, float]  # judge → mean gap in rating points
    pairs: int | None
    strata: dict[str, float] | None  # percent of pairs by correctness, such as "right_wrong"
    waterfall: dict[str, int]  # counts from prompts to pairs
    chosen_tokens: float
    rejected_tokens: float
    truncated: float  # percent of the evaluated answers
    tokens: float
    training: TrainingSummary
    changes: dict[str, ArmChange] = field(metadata=MERGED)  # by domain

    @property
    def name(self) -> str:
        """Name of the arm."""
        return self.arm.name

    @property
    def delta(self) -> float | None:
        """In-domain generator delta; None where it was not measured."""
        measured = (self.generator_delta or {}).get("in")
        return None if measured is None else measured.value


@dataclass
class Trend:
    """Change against generator delta, over the arms of one objective's ladder."""

    objective: str
    domain: str
    rungs: int  # arms
    low: str  # arm of the smallest delta
    high: str  # arm of the largest delta
    per_10: Estimate  # slope: points of change per 10 points of generator delta
    ends: Estimate  # high minus low
    kendall: float  # rank correlation
    centre: tuple[float, float]  # mean delta, mean change


@dataclass
class Contrast:
    """Arm a minus arm b."""

    a: str
    b: str
    kind: str  # how the pairs of b were selected
    difference: ByDomain = field(metadata=MERGED)


@dataclass
class SurvivalChange:
    """Changes of two arms in one domain, and a minus b."""

    a: Estimate
    b: Estimate
    difference: Estimate


@dataclass
class Survival:
    """Two arms that differ only in the judge whose ratings shaped their pairs."""

    a: str
    b: str
    first: str  # judge of a
    second: str  # judge of b
    shared: float  # percent of the smaller arm's pairs
    changes: dict[str, SurvivalChange] = field(metadata=MERGED)  # by domain


@dataclass
class JudgeAudit:
    """A judge against solutions that were corrupted in a known dimension to a known degree."""

    auc: dict[str, Estimate]  # by dimension: clean above corrupted
    auc_mean: float
    curves: dict[str, list[float]]  # dimension → mean rating at every degree; NaN where none was
    useless: list[str]  # dimensions below USELESS_AUC


@dataclass
class JudgeSummary:
    """One judge on the generators' traces, and against known corruption."""

    name: str
    kind: str
    traces: int  # rated
    dimensions: tuple[str, ...]
    by_generator: dict[str, float]  # mean rating
    mass: float  # mean probability on the labels 1 to 5
    auc_correct: Estimate  # of the mean rating, for verified correctness
    halo: float  # mean rank correlation between dimensions
    length: float  # rank correlation of the mean rating with the number of tokens
    audit: JudgeAudit | None = field(metadata=MERGED)


@dataclass
class Agreement:
    """Two judges on all traces, and on the pairs of one arm."""

    first: str
    second: str
    traces: int
    spearman: float
    arm: str
    pairs: int
    bins: list[GapBin]
    alike: float  # share of pairs ordered alike; NaN where the first judge orders none
    overlap: float  # share of the widest quarter that both have
    overlap_chance: float


@dataclass
class StageSummary:
    """Artifacts of one stage: time and throughput; None where it was not counted."""

    stage: str
    artifacts: int
    seconds: float
    share: float  # percent of all seconds
    tokens: int | None
    compile_seconds: float | None
    tokens_per_second: float | None
    padding: float | None  # percent of packed positions without a token


@dataclass
class DropCount:
    """A count of something dropped, cut or skipped."""

    where: str  # label of the artifact
    what: str
    count: int


@dataclass
class Finding:
    """One sentence of the page's headline."""

    topic: str
    text: str


@dataclass
class Summary:
    """All numbers and sentences of a page; what a study lacks is empty, or None."""

    name: str
    question: str
    domains: list[str]
    # Arms of the config that this run left out, and the comparisons that need them.
    left_out: list[str] = field(default_factory=list)
    uncompared: list[str] = field(default_factory=list)
    student: Evaluation | None = None
    suites: list[SuiteSummary] = field(default_factory=list)
    # Smallest change in points that one arm would show, by domain; planned before training.
    detectable: dict[str, float] = field(default_factory=dict)
    detectable_seeds: int = 1
    generators: list[GeneratorSummary] = field(default_factory=list)
    arms: list[ArmSummary] = field(default_factory=list)
    trends: list[Trend] = field(default_factory=list)
    contrasts: list[Contrast] = field(default_factory=list)
    survival: list[Survival] = field(default_factory=list)
    controls: list[Contrast] = field(default_factory=list)
    judges: list[JudgeSummary] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    stages: list[StageSummary] = field(default_factory=list)
    dropped: list[DropCount] = field(default_factory=list)
    judge_sentences: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
