"""What crosses between client, controller and replica: requests, sampling parameters, outputs, errors.

Plain frozen dataclasses and msgpack; nothing here imports torch or ray. Whoever decodes bytes that came over the
wire gets exactly these types or `BadRequest`; bounds are checked in one place, `worker.door`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple

from .packing import packb, unpackb

GRAMMAR_FAILED = "grammar: "  # how the error of a sequence begins that its own grammar is to blame for


class QuireError(Exception):
    """Base of the errors that a client may see."""


class BadRequest(QuireError):
    """The request itself is wrong; sending it again will not help.

    `field` is the API field at fault, `limit` (in `message`) what would have been accepted.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class Overloaded(QuireError):
    """The bounded queue is full; the same request may be accepted in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class ReplicaLost(QuireError):
    """The replica that ran the request is gone, or refuses work because it is leaving."""


class DeadlineExceeded(QuireError):
    """The request's deadline passed while it still waited for its turn; nothing of it was computed."""


class RequestFailed(QuireError):
    """The request was given up: replica after replica has died while it ran there."""


class FinishReason(StrEnum):
    """Why a sequence ended. `STOP` covers end-of-sequence, stop token ids and stop strings; `DEADLINE` never ran; `MOVED` ended here
    only, and goes on at another replica."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    DEADLINE = "deadline"
    MOVED = "moved"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Defaults are vLLM's and OpenAI's.

    Attributes:
        n: sequences generated for each prompt; they share the prompt's pages.
        max_tokens: output tokens at most; None means up to the model's limit.
        min_tokens: output tokens before end-of-sequence, stop token ids or stop strings may end the sequence.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: most likely tokens kept; 0 is off (-1 is accepted and means off).
        min_p: tokens below `min_p * max probability` are dropped; 0 is off.
        presence_penalty, frequency_penalty: over output tokens, in [-2, 2].
        repetition_penalty: over prompt and output tokens, > 0; 1 is off.
        logit_bias: token id -> value added to the logit, in [-100, 100].
        seed: key of the counter-based random numbers; None lets the engine choose one.
        logprobs: how many alternatives to report for each output token; 0 reports the chosen token alone.
        prompt_logprobs: the same for prompt tokens (OpenAI's `echo` with `logprobs`); turns prefix reuse off.
        stop: strings that end the text; applied where tokens become text, not by the engine.
        stop_token_ids: tokens that end the sequence.
        ignore_eos: go on past the end-of-sequence token.
        grammar: what the output must follow, as `worker.text.grammar.grammar_of` writes it; empty: anything. It ends the sequence where
            nothing may follow, whatever `min_tokens` and `ignore_eos` say.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: str = ""

    @property
    def penalized(self) -> bool:
        """Whether what has been said weighs on what comes next."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One client request: every prompt in it is admitted, or none is.

    Attributes:
        request_id: unique among live requests; the `id` that the client sees.
        prompts: token ids, one tuple for each prompt. Choice `i * n + k` is sequence k of prompt i.
        params: shared by all sequences.
        priority: lower runs first (0 is the default); ties go by arrival.
        tenant: the authenticated caller; salts the prefix cache, so that tenants never share pages.
        deadline_ms: milliseconds that it may still wait, from the moment of sending, before its first step; None for ever.
        resume: for a request that another replica has lost: choice -> the output tokens that its client already has. A choice
            that is not in it has ended and is not started. Tokens, indices, penalties and random numbers go on from there.
        trace: W3C `traceparent` of the span that the replica's spans belong under; empty when nothing is traced.
        attempt: counts the times that its ingress has sent it somewhere. A later attempt replaces an earlier one, and outputs and
            aborts name the attempt that they belong to, so that what is left of an earlier one does no harm.
        seed: where its random numbers come from when `params.seed` is None, so that a resumed request goes on with the same ones;
            None lets the engine choose.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams = SamplingParams()
    priority: int = 0
    tenant: str = ""
    deadline_ms: int | None = None
    resume: dict[int, tuple[int, ...]] | None = None
    trace: str = ""
    attempt: int = 0
    seed: int | None = None

    @property
    def choices(self) -> tuple[int, ...]:
        """The choices that are to be computed."""
        return tuple(range(len(self.prompts) * self.params.n)) if self.resume is None else tuple(sorted(self.resume))

    def to_wire(self) -> bytes:
        """This request as msgpack."""
        return packb(asdict(self))

    @staticmethod
    def from_wire(data: bytes) -> GenerateRequest:
        """The inverse of `to_wire`. Field names are checked here; types and bounds by `worker.door.check`.

        Raises:
            BadRequest: the bytes are not msgpack, or a field is unknown or missing.
        """
        try:
            raw = unpackb(data)
        except ValueError as error:
            raise BadRequest("request", f"not msgpack: {error}") from None
        body = _known_fields("request", raw, GenerateRequest)
        body["params"] = SamplingParams(**_known_fields("params", body.get("params", {}), SamplingParams))
        for name in ("request_id", "prompts"):
            if name not in body:
                raise BadRequest(name, "is missing")
        return GenerateRequest(**body)


def _known_fields(name: str, raw: Any, of: type) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadRequest(name, "must be a map")
    known = {f.name for f in fields(of)}
    for key in raw:
        if key not in known:
            raise BadRequest(f"{name}.{key}", "unknown field")
    return dict(raw)


class TokenLogprob(NamedTuple):
    """Natural-log probability of one token, from the model's distribution before any penalty, bias or temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely (token, logprob), best first; its length is `logprobs`


class SequenceOutput(NamedTuple):
    """What one sequence gained in one step.

    Attributes:
        request_id, choice: which sequence (`choice = prompt_index * n + k`).
        index: position of `tokens[0]` among the sequence's output tokens; makes duplicates and gaps visible.
        tokens: new output tokens (may be empty when only the end or prompt logprobs are reported).
        finish: None while the sequence goes on; set exactly once, on its last output.
        stop_token: the stop token id (or end-of-sequence id) that ended the sequence, if one did; it is the last of `tokens`.
        cached_tokens: prompt tokens taken from the prefix cache; sent with the first output, else None.
        logprobs: one for each of `tokens`, or None when not asked for.
        prompt_logprobs: one for each prompt token from the second on; with the first output, when asked for.
        error: the message for `FinishReason.ERROR`.
        attempt: `GenerateRequest.attempt` of the request that it comes from; a migration does not change it.
        peer: (replica id, epoch) of the other replica in a migration: with `MOVED` the one that goes on from `index`; without a finish
            the one that it came from, in the first output after its arrival, which has no tokens and says at which index the next stands.
    """

    request_id: str
    choice: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    attempt: int = 0
    peer: tuple[str, int] | None = None


class EngineStats(NamedTuple):
    """Counters and gauges of one replica, as they stand after a step. Counters only grow."""

    steps: int
    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_active: int
    pages_reserved: int
    prompt_tokens: int
    output_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    recomputed_tokens: int
    preemptions: dict[str, int]  # by action
    step_seconds: float  # time spent in steps, in all
    host_pages_free: int
    host_pages_cached: int
    host_pages_active: int
    host_hit_tokens: int  # of `prefix_hit_tokens`, those that came from host memory
    moved_bytes: dict[str, int]  # by kind of move, all ranks together
    stall_seconds: float  # that sequences which had begun stood still, each for itself
    predicted_seconds: dict[str, float]  # what preemptions were to cost, by action
    actual_seconds: dict[str, float]  # what they came to
    disk_pages: int = 0  # that suspended sequences have in files


class ModelInfo(NamedTuple):
    """What the front end must know of the model that a replica serves."""

    name: str
    path: str  # directory or file, for the tokenizer
    max_model_len: int  # prompt and output, in tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    created_s: int  # unix time of the replica's start
    page_size: int = 32  # tokens in a page
    pool_tokens: int = 2**31 - 1  # tokens that the whole page pool holds
    max_sequences: int = 2**31 - 1  # sequences that may run or wait
    max_running: int = 2**31 - 1  # sequences that run at once
    tp: int = 1  # ranks
    sampling: tuple[tuple[str, float], ...] = ()  # the model's own defaults: name in `SamplingParams`, and value

    def default_params(self, prompt_tokens: int = 0) -> SamplingParams:
        """What a request gets that says nothing. The model's `max_tokens` is cut to the room that a prompt of so many tokens leaves."""
        params = SamplingParams(**dict[str, Any](self.sampling))
        if params.max_tokens is None:
            return params
        room = min(self.max_model_len, self.pool_tokens) - prompt_tokens
        return replace(params, max_tokens=max(min(params.max_tokens, room), 1))  # without any room, the door says so


class LiveRequest(NamedTuple):
    """A request that a replica holds, as it stands."""

    request_id: str
    tenant: str
    priority: int
    state: str  # "running" when any of its sequences is, else "waiting"
    sequences: int  # that have not ended
    prompt_tokens: int
    output_tokens: int  # of all its sequences
    pages: int  # that its block tables hold, shared ones once for each


class Outcome(StrEnum):
    """How a migration ended, seen from its source."""

    MOVED = "moved"  # it goes on at the destination
    FILLED = "filled"  # the pages have been copied
    REFUSED = "refused"  # by the destination, or here: nothing was begun
    ABORTED = "aborted"  # it goes on at the source, if it has not ended or been given up meanwhile
    LOST = "lost"  # the destination has not answered whether it took over: ended here too, so its ingress resumes it


class MigrationResult(NamedTuple):
    """What came of a migration.

    Attributes:
        pages, bytes: that were sent, by all ranks.
        downtime_ms: from the step boundary at which the source stopped until it heard that the destination goes on.
        reason: why not, in words; empty for `MOVED` and `FILLED`.
    """

    outcome: Outcome
    pages: int = 0
    bytes: int = 0
    downtime_ms: float = 0.0
    reason: str = ""


class ReplicaLoad(NamedTuple):
    """What routing goes by: gauges as they stand, and speeds as measured (smoothed; 0.0 when never)."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_active: int
    pages_reserved: int
    pages_host: int
    pending_tokens: int  # that running and waiting sequences have yet to compute before their next output token, decodes left out
    lowest_priority: int  # the largest priority number among running sequences; -(2**31) when none runs
    prefill_tokens_per_s: float
    decode_step_s: float  # of a step that only decodes
    steps: int


class EventFrame(NamedTuple):
    """What has changed on a replica since the controller asked last (`ReplicaActor.events`).

    Events are numbered from 0 in each life (epoch) of a replica; `after` and `next` are such numbers. When the replica no longer has
    all events from `after` on, or the controller has none, the frame is a dump: forget what was known of the replica.
    """

    replica_id: str
    epoch: int
    after: int  # the number asked for; meaningless in a dump
    next: int  # the number to ask for next
    dump: bool
    stored: tuple[bytes, ...]  # page hashes that became findable and still are
    removed: tuple[bytes, ...]  # page hashes that were findable and no longer are
    started: tuple[LiveRequest, ...]  # requests that were taken and live; in a dump all that live
    ended: tuple[tuple[str, int], ...]  # (request id, its output tokens) of requests that ended
    served: dict[str, int]  # tenant -> output tokens generated for it in this life, of tenants with a live or recent request
    load: ReplicaLoad
    moved: tuple[str, ...] = ()  # ids in `ended` that ended here only, and go on at another replica


def pack_events(frame: EventFrame) -> bytes:
    """An event frame as msgpack arrays."""
    return packb(frame)


def unpack_events(data: bytes) -> EventFrame:
    """The inverse of `pack_events`."""
    frame = EventFrame(*unpackb(data))
    return frame._replace(started=tuple(LiveRequest(*r) for r in frame.started), load=ReplicaLoad(*frame.load))


class Frame(NamedTuple):
    """All that one step of a replica has for one ingress. `number` counts this stream's frames without gaps."""

    replica_id: str
    epoch: int
    number: int
    outputs: tuple[SequenceOutput, ...]
    stats: EngineStats | None = None  # on heartbeats (at least every second, also when idle)


def pack_frame(frame: Frame) -> bytes:
    """A frame as msgpack arrays (field names do not travel)."""
    return packb(frame)


def unpack_frame(data: bytes) -> Frame:
    """The inverse of `pack_frame`."""
    replica_id, epoch, number, outputs, stats = unpackb(data)
    return Frame(replica_id, epoch, number, tuple(map(_output, outputs)), EngineStats(*stats) if stats else None)


def _output(raw: tuple[Any, ...]) -> SequenceOutput:
    request_id, choice, index, tokens, finish, stop_token, cached, logprobs, prompt_logprobs, error, attempt, peer = raw
    return SequenceOutput(
        request_id,
        choice,
        index,
        tokens,
        FinishReason(finish) if finish else None,
        stop_token,
        cached,
        tuple(TokenLogprob(*lp) for lp in logprobs) if logprobs is not None else None,
        tuple(TokenLogprob(*lp) for lp in prompt_logprobs) if prompt_logprobs is not None else None,
        error,
        attempt,
        peer,
    )
