"""The server of federated sampling against transports that fail, clients that lie, and restarts."""

import logging
from collections import Counter

import numpy as np
import pytest

from ergodica.run.federated_law import federated_law
from ergodica.run.journal import Journal
from ergodica.run.orders import Reply
from ergodica.run.rounds import Rounds, RoundsError, run_rounds
from tests.support.fake_clients import Chaotic, Perfect, federated, make_rounds, positions
from tests.support.statistics import REJECTION, assert_mean, z_scores

L, MEANS, PRIOR = [2.0, 4.0, 6.0], [-2.0, 0.5, 1.0], 0.1
SHARES = np.array([2.0, 4.0, 6.0]) / 12
STEP = 0.02


ROUGH = ([2.5, 3.0, 6.0], [-1.0, 0.3, 1.0])  # surrogates with which it matters where a visit is made


def three(surrogates=ROUGH):
    return federated(L, MEANS, PRIOR, STEP, SHARES, surrogates)


def run(rounds, transport, **options):
    run_rounds(rounds, transport, clock=transport.clock, poll=0.0, **options)
    return rounds


def small(clients=None, **settings):
    settings = {"num_visits": 12, "num_chains": 3, "seed": 5, "patience": 8.0, **settings}
    return make_rounds(three() if clients is None else clients, shares=SHARES, stride=5, **settings)


class TestTransport:
    def test_losses_repeats_delays_and_absences_change_no_bit(self):
        """A visit is a function of its order: whatever the network does, the chains are those of a perfect one."""
        expected = positions(run(small(), Perfect(three())))
        for seed in range(5):
            rounds = run(small(), Chaotic(three(), seed))
            np.testing.assert_array_equal(positions(rounds), expected)
            assert sum(rounds.refused.values()) > 0, "nothing was repeated or late: the test saw nothing"

    def test_a_server_that_believes_old_results_is_seen(self):
        class Believing(Rounds):  # a mutant: takes any result of the chain for its present visit
            def offer(self, reply):
                chain = int(reply.id.split(".")[0])
                c = self.chains[chain]
                if c.visit == self.plan.num_visits:
                    return "over"
                count = np.asarray(c.steps + self.plan.local_steps[c.client], np.int32)
                present = {"id": f"{chain}.{c.visit}.{c.attempt}", "client": c.client}
                return super().offer(reply._replace(**present, state=(reply.state[0], count)))

        honest = small()
        mutant = Believing(honest.plan, honest.order, honest.starts, honest.template)
        run(mutant, Chaotic(three(), 0))
        assert not np.array_equal(positions(mutant), positions(run(small(), Perfect(three()))))

    def test_results_are_those_of_a_plain_loop(self):
        rounds = run(small(), Perfect(three()))
        clients, again = three(), small()
        for c in range(3):
            for visit in range(12):
                order = again._visit(c)
                assert order.client == again.order(c, visit) == rounds.draws[c].client[visit]
                assert again.offer(clients.answer(order)) == "accepted"
        np.testing.assert_array_equal(positions(again), positions(rounds))

    def test_a_lost_order_is_sent_again_at_once(self):
        rounds = small()
        (first, *_) = rounds.issue({0, 1, 2}, now=0.0)
        assert rounds.offer(Reply(first.id, first.client, lost=True)) == "lost"
        (again,) = rounds.issue({0, 1, 2}, now=0.0)
        assert again.id == first.id
        np.testing.assert_array_equal(again.words, first.words)
        assert rounds.offer(three().answer(again)) == "accepted"
        (after, *_) = rounds.issue({0, 1, 2}, now=0.0)
        assert rounds.offer(Reply(first.id, first.client, lost=True)) == "lost"  # news of an order that is over
        assert rounds.issue({0, 1, 2}, now=0.0) == []
        assert after.chain == first.chain
        assert not rounds.refused

    def test_nothing_is_sent_twice_before_its_time(self):
        rounds = small(patience=8.0)
        assert len(rounds.issue({0, 1, 2}, now=0.0)) == 3
        for now in (0.0, 7.9):
            rounds.expire({0, 1, 2}, now)
            assert rounds.issue({0, 1, 2}, now) == []
        rounds.expire({0, 1, 2}, 8.0)
        assert len(rounds.issue({0, 1, 2}, 8.0)) == 3

    def test_it_gives_up_where_nobody_answers(self):
        with pytest.raises(RoundsError, match="No result was accepted"):
            run(small(), Perfect(three(), present=set()), give_up_after=50)


class TestAbsentClients:
    def test_visits_wait_for_their_client(self):
        clients = three()
        rounds, transport = small(), Perfect(three(), present={0, 2})
        with pytest.raises(RoundsError):
            run(rounds, transport, give_up_after=50)
        transport.present = {0, 1, 2}  # it comes back
        np.testing.assert_array_equal(positions(run(rounds, transport)), positions(run(small(), Perfect(clients))))

    def test_who_comes_back_is_sent_the_visit_at_once(self):
        rounds = small(patience=100.0)
        clients = {chain.client for chain in rounds.chains}
        rounds.expire(set(), 0.0)
        assert rounds.issue(set(), 0.0) == []
        rounds.expire(clients, 1.0)
        assert len(rounds.issue(clients, 1.0)) == 3

    def test_redrawn_visits_make_the_run_go_on_and_stale_answers_are_refused(self):
        rounds = small(absent="redraw")
        transport = Perfect(three(), present={0, 2})
        run(rounds, transport)
        assert {client for d in rounds.draws for client in d.client} == {0, 2}
        late = small(absent="redraw")
        (order, *_) = late.issue({0, 1, 2}, now=0.0)
        late.expire({s for s in (0, 1, 2) if s != order.client}, now=100.0)
        assert late.chains[0].attempt == 1
        assert late.offer(three().answer(order)) == "stale"

    @pytest.mark.parametrize("exact", [True, False])
    def test_who_is_gone_for_good_is_represented_by_its_surrogate(self, exact):
        """Mean and variance are those of the exact law over the clients that are there.

        200 chains see an error of 4% in the variance and of 0.02 in the mean; forgetting the surrogate moves the mean by 0.2.
        """
        clients = three((L, MEANS) if exact else ([2.0, 3.0, 6.0], [-2.0, 0.3, 1.0]))
        present = [0, 2]
        rounds = make_rounds(
            clients, shares=SHARES, num_visits=60, num_chains=200, seed=3, stride=10, absent="redraw", patience=2.0
        )
        run(rounds, Perfect(clients, present={0, 2}))
        p = SHARES[present] / SHARES[present].sum()
        full = clients.steps()
        some = full._replace(
            transition=full.transition[present],
            drift=full.drift[present],
            added=np.broadcast_to(full.added, full.transition.shape)[present],
        )
        law = federated_law(some, p, 10).visits
        ends = positions(rounds, slice(10, None))[:, :, 0]
        assert_mean(ends.mean(1), law.mean[0], smallest_error=0.1)
        assert_mean(((ends - law.mean[0]) ** 2).mean(1), law.covariance[0, 0], smallest_error=0.1)
        if not exact:
            everyone = federated_law(
                full._replace(added=np.broadcast_to(full.added, full.transition.shape)), SHARES, 10
            )
            assert abs(z_scores(ends.mean(1), everyone.visits.mean[0])) > REJECTION


class TestRefusals:
    def refuse(self, change, verdict, caplog, **settings):
        """A client that changes its answers so is refused, that is logged, and the run goes on to the end."""

        class Lying(Perfect):
            def receive(self, seconds):
                return [change(r) if r.client == 1 else r for r in super().receive(seconds)]

        rounds = small(**settings)
        with caplog.at_level(logging.WARNING, logger="ergodica.rounds"):
            run(rounds, Lying(three()))
        assert rounds.refused[1, verdict] == 3
        assert rounds.suspended == {1}
        assert "refused a result of client 1 for visit" in caplog.text
        assert "client 1 is left out: 3 results in a row" in caplog.text
        assert all(1 not in d.client for d in rounds.draws)
        assert rounds.done
        assert np.all(np.isfinite(positions(rounds)))

    @pytest.mark.parametrize(
        ("change", "verdict"),
        [
            (lambda r: r._replace(state=(r.state[0] * np.nan, r.state[1])), "nonfinite"),
            (lambda r: r._replace(positions=(r.positions[0] + np.inf,)), "nonfinite"),
            (lambda r: r._replace(state=(r.state[0][None], r.state[1])), "malformed"),
            (lambda r: r._replace(state=(r.state[0].astype(np.float32), r.state[1])), "malformed"),
            (lambda r: r._replace(state=(r.state[0].astype(object), r.state[1])), "malformed"),
            (lambda r: r._replace(positions=()), "malformed"),
            (lambda r: r._replace(positions=(r.positions[0][:1],)), "malformed"),
            (lambda r: r._replace(state=r.state[::-1]), "malformed"),
            (lambda r: r._replace(state=(r.state[0] + 1, r.state[1])), "inconsistent"),
            (lambda r: r._replace(state=(r.state[0], r.state[1] + np.int32(1))), "inconsistent"),
            (lambda r: r._replace(state=(), positions=(), error="out of memory"), "failed"),
        ],
    )
    def test_garbage(self, change, verdict, caplog):
        self.refuse(change, verdict, caplog)

    def test_answers_to_what_was_never_asked(self):
        rounds = small()
        rounds.issue({0, 1, 2}, 0.0)
        client = rounds.chains[0].client
        for id in (
            "",
            "0.0",
            "0.0.0.0",
            "0.99.0",
            "7.0.0",
            "-1.0.0",
            "0.1.0",
            "0.0.1",
            "a.b.c",
            "0.²0.0",
            "9" * 5000 + ".0.0",
        ):
            assert rounds.offer(Reply(id, client)) == "unknown", id
        assert rounds.chains[0].visit == 0

    def test_an_answer_for_another_client_is_refused_and_the_right_one_taken(self):
        rounds = small()
        (order, *_) = rounds.issue({0, 1, 2}, 0.0)
        answer = three().answer(order)
        assert rounds.offer(answer._replace(client=(order.client + 1) % 3)) == "wrong client"
        assert rounds.offer(answer) == "accepted"
        assert rounds.offer(answer) == "duplicate"

    def test_honest_clients_are_forgiven_single_failures(self):
        answers = Counter()

        class Sometimes(Perfect):
            def receive(self, seconds):
                found = []
                for r in super().receive(seconds):
                    answers[r.client] += 1
                    found.append(r._replace(error="busy") if answers[r.client] % 2 == 0 else r)
                return found

        rounds = run(small(num_visits=40), Sometimes(three()))
        assert rounds.refused
        assert rounds.suspended == set()

    def test_a_run_without_any_honest_client_ends(self):
        class Lying(Perfect):
            def receive(self, seconds):
                return [r._replace(state=()) for r in super().receive(seconds)]

        with pytest.raises(RoundsError, match="All clients were left out"):
            run(small(), Lying(three()))


class TestRestart:
    def test_a_run_that_is_killed_at_any_byte_goes_on_to_the_same_end(self, tmp_path):
        """No accepted sample is lost or made twice, with absences and refusals in between."""
        identity = {"seed": "5"}

        class Liar(Chaotic):
            def receive(self, seconds):
                return [r._replace(state=()) if r.client == 0 else r for r in super().receive(seconds)]

        with Journal(tmp_path / "whole", identity) as journal:
            rounds = small(journal=journal, absent="wait")
            run(rounds, Liar(three(), 1))
        assert rounds.suspended == {0}
        content = (tmp_path / "whole").read_bytes()
        for cut in np.linspace(len(content) // 10, len(content) - 1, 12).astype(int):
            path = tmp_path / f"cut-{cut}"
            path.write_bytes(content[:cut])
            with Journal(path, identity) as journal:
                again = small(journal=journal)
                before = [len(d.client) for d in again.draws]
                run(again, Liar(three(), int(cut)))
            assert sum(before) < 36
            for whole, redone, kept in zip(rounds.draws, again.draws, before, strict=True):
                assert len(redone.client) == 12
                np.testing.assert_array_equal(
                    [p[0] for p in redone.positions[:kept]], [p[0] for p in whole.positions[:kept]]
                )
            with Journal(path, identity) as journal:
                finished = small(journal=journal)
            assert finished.done
            assert finished.suspended == again.suspended
            np.testing.assert_array_equal(positions(finished), positions(again))

    def test_a_restart_without_refusals_changes_no_bit(self, tmp_path):
        expected = positions(run(small(), Perfect(three())))
        with Journal(tmp_path / "journal", {}) as journal:
            first, transport = small(journal=journal), Chaotic(three(), 4)
            for _ in range(20):
                first.expire(transport.available(), transport.time)
                transport.send(first.issue({0, 1, 2}, transport.time))
                for reply in transport.receive(0.0):
                    first.offer(reply)
            done = sum(len(d.client) for d in first.draws)
            late = [transport.clients.answer(first._visit(c)) for c in range(3) if first.chains[c].visit < 12]
        assert 0 < done < 36
        with Journal(tmp_path / "journal", {}) as journal:
            second = small(journal=journal)
            assert sum(len(d.client) for d in second.draws) == done
            assert [second.offer(r) for r in late] == ["accepted"] * len(late)  # asked for before the restart
            assert [second.offer(r) for r in late] == ["duplicate"] * len(late)
            run(second, Chaotic(three(), 8))
        np.testing.assert_array_equal(positions(second), expected)

    def test_shares_that_were_estimated_are_estimated_alike(self, tmp_path):
        settings = {"estimate_shares": "always", "absent": "redraw", "num_visits": 30}
        with Journal(tmp_path / "journal", {}) as journal:
            first = run(small(journal=journal, **settings), Perfect(three(), present={0, 2}))
        with Journal(tmp_path / "journal", {}) as journal:
            second = small(journal=journal, **settings)
        np.testing.assert_array_equal(second.shares, first.shares)
        assert second.draws[0].share == first.draws[0].share


class TestPlan:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_visits": 0}, "num_visits"),
            ({"num_warmup": 12}, "num_warmup"),
            ({"keys": "none"}, "keys"),
            ({"absent": "ignore"}, "absent"),
            ({"estimate_shares": "warmup"}, "num_warmup"),
            ({"local_steps": 12}, "stride"),
        ],
    )
    def test_what_cannot_be_is_said(self, settings, message):
        with pytest.raises((ValueError, TypeError), match=message):
            small(**settings)
