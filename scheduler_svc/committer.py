"""Taking a step's result: tokens to their branches, candidates to their beams, and who ends."""

from __future__ import annotations

import numpy as np

from scheduler_svc.beam_group import BeamGroup
from scheduler_svc.lifecycle import Lifecycle
from scheduler_svc.request import Branch, RequestStatus, TokenIds
from scheduler_svc.step_plan import (
    Finished,
    FloatArray,
    Logprobs,
    StepOutput,
    StepPlan,
    StepTokens,
    TokenColumns,
)


class CandidateColumns:
    """Each sample's part of a result's candidate columns."""

    def __init__(self, plan: StepPlan, result: StepTokens) -> None:
        """Lay the columns of `result` out by the samples of `plan`."""
        assert plan.num_candidates is not None
        self._result = result
        self._counts = plan.num_candidates
        self._ends = np.cumsum(self._counts)
        self._index_of_asking = np.cumsum(self._counts > 0) - 1

    def of(self, sample: int) -> tuple[TokenIds, FloatArray]:
        """The sample's likeliest tokens [n] and their log-probabilities [n], best first."""
        end = int(self._ends[sample])
        span = slice(end - int(self._counts[sample]), end)
        return self._result.candidate_token_ids[span], self._result.candidate_logprobs[span]

    def logprobs(self, sample: int, num_logprobs: int) -> Logprobs:
        """What the client of this sample asked for; see Sampling.num_logprobs."""
        token_ids, logprobs = self.of(sample)
        own = float(self._result.token_logprobs[self._index_of_asking[sample]])
        return Logprobs(own, token_ids[: num_logprobs - 1], logprobs[: num_logprobs - 1])


class Committer:
    """Applies one result; made anew for each."""

    def __init__(self, life: Lifecycle, plan: StepPlan, result: StepTokens) -> None:
        """Apply `result` to what `plan` ran."""
        assert (plan.epoch, plan.step_id) == (result.epoch, result.step_id), (plan, result)
        assert len(plan.sampling_rows) == len(result.token_ids), (plan, result)
        self._life = life
        self._residents = life.residents
        self._rows = life.residents.rows
        self._plan = plan
        self._result = result
        self._tokens = TokenColumns()
        self._candidates: CandidateColumns | None = None
        if plan.num_candidates is not None:
            self._candidates = CandidateColumns(plan, result)

    def commit(self) -> StepOutput:
        """Returns the tokens and who ended."""
        plan, rows = self._plan, self._plan.sampling_rows
        if self._result.failed_rows:
            self._fail_rows()
        is_live = self._rows.generations[rows] == plan.sampling_generations
        if not is_live.all():
            self._commit_detached()
        if self._candidates is not None:
            is_driven = self._rows.is_driven[rows] & is_live
            for sample in np.flatnonzero(is_driven).tolist():
                self._commit_lane(self._rows.branches[rows[sample]], sample)
            is_live &= ~is_driven
        # Ending a beam search may have changed nothing here: its rows are not among these.
        self._commit_rows(np.flatnonzero(is_live) if not is_live.all() else None)
        if self._life.suspects:
            self._clear_suspects()
        output = self._tokens.build()
        self._life.counters.num_output_tokens += len(output.token_ids)
        return output

    def _commit_rows(self, samples: np.ndarray | None) -> None:
        """Append the tokens of these samples (None: all) to their rows, which are live."""
        rows, token_ids = self._plan.sampling_rows, self._result.token_ids
        if samples is not None:
            rows, token_ids = rows[samples], token_ids[samples]
        columns = self._rows
        positions = columns.num_tokens[rows]
        columns.tokens[rows, positions] = token_ids
        columns.num_tokens[rows] = positions + 1
        if self._candidates is not None:
            self._note_logprobs(samples)
        self._tokens.add(
            columns.frontends[rows],
            columns.request_ids[rows],
            columns.branch_indexes[rows],
            token_ids,
        )
        ends = self._life.is_stop_token[token_ids]
        ends |= positions + 1 >= columns.max_total_tokens[rows]
        for index in np.flatnonzero(ends).tolist():
            branch = columns.resident(int(rows[index]))
            self._end_if_over(branch, int(token_ids[index]), int(positions[index]) + 1)

    def _note_logprobs(self, samples: np.ndarray | None) -> None:
        """Log-probabilities for those who asked, by index of the entry that is to be added."""
        assert self._plan.num_candidates is not None
        assert self._candidates is not None
        asked = self._plan.num_candidates
        if samples is None:
            samples = np.arange(len(asked))
        for entry in np.flatnonzero(asked[samples]).tolist():
            sample = int(samples[entry])
            branch = self._rows.resident(int(self._plan.sampling_rows[sample]))
            self._note(branch, sample, self._tokens.num_tokens + entry)

    def _note(self, branch: Branch, sample: int, entry: int) -> None:
        num_logprobs = branch.request.sampling.num_logprobs
        if self._candidates is not None and num_logprobs:
            self._tokens.logprobs[entry] = self._candidates.logprobs(sample, num_logprobs)

    def _commit_detached(self) -> None:
        """Give preempted branches their tokens; drop those of branches that ended."""
        detached, plan = self._residents.detached, self._plan
        for sample, place in enumerate(
            zip(plan.sampling_rows.tolist(), plan.sampling_generations.tolist(), strict=True)
        ):
            branch = detached.get(place)
            if branch is None:
                continue
            if branch.last_step_id == plan.step_id:
                del detached[place]
            if not branch.status.is_finished:
                token_ids = self._result.token_ids[sample : sample + 1]
                branch.token_ids = np.append(branch.token_ids, token_ids)
                branch.num_suspicions = 0
                self._note(branch, sample, self._tokens.num_tokens)
                self._tokens.add_branch(branch, token_ids)
                self._end_if_over(branch, int(token_ids[0]), len(branch.token_ids))

    def _end_if_over(self, branch: Branch, token_id: int, num_tokens: int) -> None:
        num_output_tokens = num_tokens - branch.request.num_prompt_tokens
        if token_id in branch.request.stop_token_ids:
            status, stop_token_id = RequestStatus.FINISHED_STOP, token_id
        elif num_tokens >= branch.max_total_tokens:
            status, stop_token_id = RequestStatus.FINISHED_LENGTH, None
        else:
            return
        self._tokens.finished.append(
            self._life.end_branch(branch, status, num_output_tokens, stop_token_id)
        )

    def _fail_rows(self) -> None:
        """End the requests whose logits were not finite; the others of the step go on.

        What a branch computed that has ended meanwhile must not be found either.
        """
        plan, failed_rows = self._plan, self._result.failed_rows
        for row, generation in zip(
            plan.sampling_rows.tolist(), plan.sampling_generations.tolist(), strict=True
        ):
            if row not in failed_rows:
                continue
            if self._rows.generations[row] == generation:
                branch = self._rows.branches[row]
            else:
                branch = self._residents.detached.pop((row, generation), None)
            if branch is None:
                continue  # a lane that was preempted, or another branch failed its request
            if branch.status.is_finished:
                self._residents.kv.forget_blocks(branch.block_hashes)
            else:
                self._life.fail(
                    branch, "the model produced logits that are not finite", self._tokens
                )

    # ---- beams

    def _commit_lane(self, branch: Branch | None, sample: int) -> None:
        assert self._candidates is not None
        if branch is None:
            return  # the search ended with an earlier sample of this step
        group = self._life.groups[branch.request.key]
        if group.take(self._residents, branch, self._candidates.of(sample)):
            commit_beams(self._life, group, self._tokens)

    def _clear_suspects(self) -> None:
        """A branch that got a token in this epoch is not what ended the last one."""
        suspects = self._life.suspects
        for branch in list(suspects):
            if branch.status.is_finished or self._residents.has_progressed(branch):
                branch.num_suspicions = 0
            if not branch.num_suspicions:
                suspects.remove(branch)


def commit_beams(life: Lifecycle, group: BeamGroup, tokens: TokenColumns) -> None:
    """Publish what a beam search has decided since the last time, and end it if it is over."""
    request, search = group.request, group.search
    if not search.is_done:
        stable = search.stable_prefix()
        _add_beam_tokens(group, 0, stable, search.stable_logprobs(), tokens)
        return
    results = search.results()
    for index, result in enumerate(results):
        _add_beam_tokens(group, index, result.token_ids, result.logprobs, tokens)
    life.end_request(request, RequestStatus.FINISHED_STOP)
    for index, result in enumerate(results):
        last_token_id = int(result.token_ids[-1])
        is_stop_token = result.is_stopped and last_token_id in request.stop_token_ids
        tokens.finished.append(
            Finished(
                request,
                index,
                RequestStatus.FINISHED_STOP if result.is_stopped else RequestStatus.FINISHED_LENGTH,
                len(result.token_ids),
                is_last=index == len(results) - 1,
                stop_token_id=last_token_id if is_stop_token else None,
                score=result.score,
            )
        )


def _add_beam_tokens(
    group: BeamGroup, index: int, token_ids: TokenIds, logprobs: FloatArray, tokens: TokenColumns
) -> None:
    """Add what choice `index` [n] has beyond what was streamed of it."""
    begin = 0
    if index == 0:
        begin, group.num_streamed_tokens = group.num_streamed_tokens, len(token_ids)
    if group.request.sampling.num_logprobs:
        none = np.empty(0, np.int32), np.empty(0, np.float32)
        for offset, logprob in enumerate(logprobs[begin:].tolist()):
            tokens.logprobs[tokens.num_tokens + offset] = Logprobs(logprob, *none)
    if begin < len(token_ids):
        tokens.add_branch(group.request.branches[index], token_ids[begin:])
