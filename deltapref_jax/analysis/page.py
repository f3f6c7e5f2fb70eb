"""What a page shows, as dataclasses; `summary.summarise` computes it.

Accuracies are in percent, and their changes and differences in percentage points. A number that is
undefined is NaN, which `summary.json` writes as null. The keys of `summary.json` are the fields,
except that a field marked MERGED gives its own keys to the object that contains it.
"""

import math
from dataclasses import dataclass, field

from deltapref_jax.analysis.statistics import Estimate, GapBin
from deltapref_jax.config import Arm, Claim

ByDomain = dict[str, Estimate]  # "in", "out"
MERGED = {"merged": True}
"""Metadata of a field whose keys, a mapping's or a dataclass's, join its parent's in the JSON."""


@dataclass
class Evaluation:
    """Answers of one model to the suites."""

    accuracy: ByDomain = field(metadata=MERGED)
    truncated: float  # percent of answers cut at the token limit
    tokens: float  # mean length
    surprise: float  # nats a token: mean of -log p, at temperature 1, of what was sampled


@dataclass
class GeneratorSummary:
    """A generator's traces of the training prompts, and its evaluation."""

    name: str
    about: str
    quantization: str  # format of its matrices; "" where they are not quantised
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
    accuracy: dict[str, Estimate]  # before training, of "student" and generators
    limit: str  # "floor" or "ceiling" (suites.RULE), "" elsewhere
    changes: "MeasuredBy" = field(default_factory=dict)  # by arm


@dataclass
class Measured:
    """An effect in points, its p value adjusted over the table that it stands in."""

    estimate: Estimate
    p: float
    p_adjusted: float
    bound: float  # the effect is equivalent to 0 at every margin from here (TOST at 5%)

    @property
    def shown(self) -> bool:
        """Whether the adjusted p value is below 5%."""
        return self.p_adjusted < 0.05


MeasuredBy = dict[str, Measured]  # "in", "out"


@dataclass
class ClaimResult:
    """A comparison that was named before the run, and what became of it."""

    claim: Claim
    what: str  # in words
    about: str  # what its arms are
    effect: Measured | None  # adjusted over all claims; None where the run lacks an arm of it
    unit: str  # of the effect
    verdict: str
    hangs_on: str  # rungs that move a slope (`claims.RUNG_RULE`), and by how much; "" without any


@dataclass
class Purchase:
    """What could be bought, and about how wide an interval it would leave."""

    what: str
    half_width: float  # of a 95% interval, in points


@dataclass
class ControlResult:
    """A control that must come out, recognised from the config, and whether it did."""

    kind: str  # "null", "random", "placebo" or "negative"
    what: str  # in words
    arms: tuple[str, ...]
    effects: MeasuredBy  # adjusted over all controls and domains
    expected: str
    came_out: bool | None  # None: undecided
    reason: str  # what its intervals allow, or why it is undecided or did not come out

    @property
    def verdict(self) -> str:
        """What became of it, in words."""
        words = {True: "came out", False: "did not come out", None: "undecided"}[self.came_out]
        return f"{words}: {self.reason}"


@dataclass
class NoiseBudget:
    """Where the noise of an arm's change comes from in one domain, in points (SD)."""

    arm: str  # the one in the middle, by its noise
    seeds: int  # of this arm
    draws: int  # of its pairs
    questions: float  # of this arm, averaged over its runs
    seed: float | None  # of one run's main effect; None where no arm has several seeds
    seed_freedom: int  # degrees of freedom that measured it
    draw: float | None  # of one draw of pairs; None where it was not measured or moves nothing
    draw_freedom: int
    drawn: bool  # whether another draw gives this arm other pairs
    shares: dict[str, float]  # percent of this arm's variance: "questions", "seeds", "draws"
    half_width: float  # of a 95% interval of this arm, by Student's t
    # Change that this arm shows with 80% power at a two-sided 5%, as the only comparison; NaN where
    # too few questions differ in how they changed, and the half width is the exact interval's;
    # infinite where no change that there can be is shown so often.
    detectable: float
    detectable_adjusted: float  # likewise, by p values adjusted over all arms and domains
    options: list[Purchase]
    buy: str  # what would narrow the intervals most


@dataclass
class TrainingSummary:
    """Means over the last quarter of the steps of all seeds; NaN where a metric was not written."""

    steps: int | None
    epochs: float  # how often every pair was seen
    pairs_per_step: int  # of the config; a smaller pool is one step
    learning_rate: float  # at its peak
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

    arm: Arm = field(metadata=MERGED)  # counts below replace the config's fields
    kind: str  # of its objective
    seeds: int  # evaluated
    draws: int  # of its pairs, evaluated
    balanced: bool  # a rung that keeps some pairs only (`config.Experiment.balance`)
    redrawn: str  # how another draw gives it other pairs (`components.redrawn`); "": it does not
    budget: str  # its own steps or epochs in words; "" where it has those of all arms
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
    surprise: float  # of the evaluated answers, as in `Evaluation`
    training: TrainingSummary
    changes: MeasuredBy = field(metadata=MERGED)
    doubt: str = ""  # why the judge that shaped its pairs can't carry a conclusion

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
class Ladder:
    """The rungs of one objective (`config.ladder_of`), and the arms of its group that are none."""

    rungs: dict[str, float]  # arm → measured generator delta, ascending
    left_out: dict[str, str]  # arm → why no slope counts it
    rejected: list[str]  # authors of the rungs' rejected traces
    shared: int  # prompts with one and the same rejected trace in every rung
    prompts: int  # of any rung, each as often as it has different rejected traces


@dataclass
class Trend:
    """Change against generator delta, over the rungs of one objective's ladder."""

    objective: str
    domain: str
    rungs: int  # arms
    low: str  # arm of the smallest delta
    high: str  # arm of the largest delta
    per_10: Measured  # slope: points of change per 10 points of generator delta
    ends: Measured  # high minus low
    kendall: float  # rank correlation
    centre: tuple[float, float]  # mean delta, mean change


@dataclass
class Readout:
    """A second read-out of the student and of the arms, which no domain averages."""

    suite: str  # its name, or how many suites are read again and averaged as their domain
    domain: str  # of its questions
    what: str  # in words, such as "accuracy, greedy"
    greedy_twin: bool  # questions of the domain, sampled there and answered greedily here
    read_again: list[str]  # suites of the domain that have these questions, all or some
    averaged: int  # suites of the domain
    student: Estimate  # percent, before training
    changes: dict[str, Measured]  # by arm; p values adjusted over all arms and read-outs
    sampled: dict[str, Estimate]  # of a greedy twin: change by arm over `read_again`, as sampled
    # Of a greedy twin, by arm: the sampled change minus the greedy one, paired by question, with
    # the noise of training that this difference has; adjusted over all arms and twins.
    lost: dict[str, Measured]


@dataclass
class RateChoice:
    """The learning rates that an objective tried, and what the tuning questions chose."""

    objective: str
    arm: str  # that tried them, each with one policy
    suites: list[str]  # of the questions
    questions: int
    tried: dict[str, Estimate]  # rate → accuracy in percent, of questions alone
    chosen: str
    edge: str  # "lowest" or "highest" where it is one of those that were tried; "" otherwise
    # By rate, the chosen one minus it, paired by question; adjusted over all of the objective's.
    leads: dict[str, Measured]


@dataclass
class Contrast:
    """Arm a minus arm b."""

    a: str
    b: str
    kind: str  # how the pairs of b were selected
    difference: MeasuredBy = field(metadata=MERGED)


@dataclass
class SurvivalChange:
    """Changes of two arms in one domain, and a minus b."""

    a: Estimate
    b: Estimate
    difference: Measured


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
    """A judge against texts that were corrupted in a known dimension to a known degree."""

    auc: dict[str, Estimate]  # by dimension: a text above its corrupted versions
    # Of the sum of all ratings: a text above its versions that were corrupted in any dimension.
    auc_sum: Estimate
    curves: dict[str, list[float]]  # dimension → mean rating at every degree; NaN where none was
    texts: dict[str, int]  # dimension → texts that could be corrupted in it


@dataclass
class Reliability:
    """How well a judge's gaps agree with themselves when its rubric is worded otherwise."""

    one: float  # reliability of one reading: mean correlation between wordings
    averaged: float  # of the mean of all readings, by Spearman and Brown
    readings: int
    pairs: int


@dataclass
class JudgeOnPairs:
    """How well a judge's gaps follow the truth on the pairs of one arm."""

    arm: str
    by: list[str]  # what ratings shaped these pairs by: "sum", dimensions; [] if it shaped none
    pairs: int
    against: str  # whose gaps stand for the truth: "judge" and its name, or "correctness"
    # Rank correlation of gaps by dimension, and of their sum; NaN where one side is constant.
    dimensions: dict[str, float]
    given_length: dict[str, float]  # the same, partial: difference in tokens held constant
    tied: int | None  # pairs tied at the cut, the most of any draw; None where none was ranked
    # Share of the pairs kept as the top ones: that are expected to be truly the top by the judge's
    # own reliability, that are in the top by the truth, and by chance.
    expected_top: float
    true_top: float
    chance_top: float


@dataclass
class JudgeSummary:
    """One judge on the generators' traces, and against known corruption."""

    name: str
    kind: str
    quantization: str  # format of its matrices; "" where they are not quantised
    traces: int  # rated
    dimensions: tuple[str, ...]
    by_generator: dict[str, float]  # mean rating
    mass: float  # mean probability on the labels 1 to 5
    auc_correct: Estimate  # of the mean rating, for verified correctness
    halo: float  # mean rank correlation between dimensions
    length: float  # rank correlation of the mean rating with the number of tokens
    audit: JudgeAudit | None = field(metadata=MERGED)
    correct: float = math.nan  # rank correlation of the mean rating with verified correctness
    correct_given_length: float = math.nan  # the same, partial: tokens held constant
    edited: JudgeAudit | None = None  # on traces that the generators wrote
    reliability: dict[str, Reliability] = field(default_factory=dict)  # by dimension, and "sum"
    on_pairs: list[JudgeOnPairs] = field(default_factory=list)  # the arm of most pairs first


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
    claims: list[ClaimResult] = field(default_factory=list)
    control_results: list[ControlResult] = field(default_factory=list)
    noise: dict[str, NoiseBudget] = field(default_factory=dict)  # by domain
    quantised: str = ""  # a sentence that names the quantised models
    generators: list[GeneratorSummary] = field(default_factory=list)
    arms: list[ArmSummary] = field(default_factory=list)
    ladders: dict[str, Ladder] = field(default_factory=dict)  # by objective
    trends: list[Trend] = field(default_factory=list)
    contrasts: list[Contrast] = field(default_factory=list)
    survival: list[Survival] = field(default_factory=list)
    controls: list[Contrast] = field(default_factory=list)
    readouts: list[Readout] = field(default_factory=list)
    rates: list[RateChoice] = field(default_factory=list)
    budgets: list[Contrast] = field(default_factory=list)  # arms that differ only in their budget
    judges: list[JudgeSummary] = field(default_factory=list)
    trivial: list[JudgeSummary] = field(default_factory=list)  # correctness and length as judges
    agreement: list[Agreement] = field(default_factory=list)
    lessons: str = ""  # whether the models had met the families out of domain
    limits: list[str] = field(default_factory=list)  # what suites at floor or ceiling do
    unmeasured: list[str] = field(default_factory=list)  # what no interval of the page contains
    stages: list[StageSummary] = field(default_factory=list)
    dropped: list[DropCount] = field(default_factory=list)
    judge_sentences: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
