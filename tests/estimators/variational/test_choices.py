"""What each site gets, and the errors of what cannot be right."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

from ergodica.estimators import (
    ELBO,
    IWELBO,
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    Reparam,
    Score,
    SiteError,
    VariationalGradient,
    expectation_gradient,
)
from tests.support.exact_programs import CASES

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def plan(loss, case):
    return {row.site: row for row in loss.plan(case.model, case.guide, *case.args).rows}


def test_rule_and_precedence():
    case = CASES["mixed"]()
    rows = plan(ELBO(2), case)
    assert {name: row.estimator for name, row in rows.items()} == {
        "z": "Enumerate()",
        "w": "Reparam()",
        "c": "Enumerate()",
    }
    assert rows["c"].terms == ("log p(c)", "log p(x)", "-log q(c)")
    rows = plan(ELBO(2, {"*": LeaveOneOut(), "w": "auto"}), case)
    assert {name: row.estimator for name, row in rows.items()} == {
        "z": "LeaveOneOut()",
        "w": "Reparam()",
        "c": "LeaveOneOut()",
    }
    assert plan(IWELBO(2), case)["z"].estimator == "VIMCO()"


def test_a_site_can_say_it_itself_and_sites_come_first():
    def model():
        numpyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("l", jnp.array(0.1))), infer={"gradient": Score()})

    assert ELBO(2).plan(model, guide).rows[0].estimator == "Score()"
    assert ELBO(2, {"*": LeaveOneOut()}).plan(model, guide).rows[0].estimator == "Score()"
    assert ELBO(2, {"z": LeaveOneOut()}).plan(model, guide).rows[0].estimator == "LeaveOneOut()"


def test_explain_says_what_it_does(capsys):
    case = CASES["plated"]()
    ELBO(3, {"z": LeaveOneOut()}).explain(case.model, case.guide, *case.args)
    printed = capsys.readouterr().out
    assert "3 particles: 9 runs of model and guide a step; the gradient is unbiased" in printed
    assert "named in sites" in printed
    assert "3 values can be summed over" in printed


def _large(size):
    def model():
        b = numpyro.sample("b", dist.Bernoulli(0.5).expand([size]))
        numpyro.factor("f", jnp.sum(1.0 * b) ** 2)

    def guide():
        numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("l", jnp.zeros(size))))

    return model, guide


def _circle():
    numpyro.sample("w", dist.VonMises(numpyro.param("t", jnp.array(0.3)), 1.0))


def _normal_model():
    numpyro.sample("w", dist.Normal(0.0, 1.0))


def test_joint_elements_are_counted_and_refused():
    assert ELBO(2).plan(*_large(4)).rows[0].estimator == "Enumerate()"
    assert ELBO(2).plan(*_large(5)).rows[0].estimator == "LeaveOneOut()"
    with pytest.raises(SiteError, match=r"depend on 20 of its elements jointly, which have 2\^20 configurations"):
        ELBO(2, {"b": Enumerate()}).plan(*_large(20))


def test_errors_say_what_to_do():
    case, (model, guide) = CASES["mixed"](), _large(20)
    with pytest.raises(ValueError, match="sites names 'y', which the guide does not draw; it draws 'z', 'w', 'c'"):
        plan(ELBO(2, {"y": Score()}), case)
    with pytest.raises(
        SiteError, match=r"num_particles=1 there are no other particles for a baseline\. Raise num_particles"
    ):
        ELBO(1).plan(model, guide)
    with pytest.raises(SiteError, match=r"site 'w' \(VonMises\).*NumPyro has no reparameterisation of it"):
        ELBO(2, {"w": Reparam()}).plan(_normal_model, _circle)
    with pytest.raises(SiteError, match="is no mean over particles"):
        plan(IWELBO(2, {"z": Enumerate()}), case)
    with pytest.raises(ValueError, match=r"The model draws 'w'.*Draw it in the guide, observe it, or sum it out"):
        ELBO(2).plan(_normal_model, lambda: None)
    with pytest.raises(ValueError, match="The guide draws 'w', which the model does not draw"):
        ELBO(2).plan(lambda: None, _normal_model)
    with pytest.raises(ValueError, match=r"shape \(3,\) in the guide and \(\) in the model"):
        ELBO(2).plan(_normal_model, lambda: numpyro.sample("w", dist.Normal(jnp.zeros(3), 1.0)))
    with pytest.raises(TypeError, match="baseline must be a number"):
        Score("mean")
    with pytest.raises(ValueError, match="decay must be above 0 and below 1"):
        MovingAverage(1.5)
    with pytest.raises(ValueError, match=r"f must return a scalar; got shape \(2,\)"):
        expectation_gradient(jax.random.key(0), jnp.zeros(2), lambda p: dist.Normal(p, 1.0), lambda x: x)


def test_doubly_reparameterised_sites_that_would_be_wrong_are_refused():
    case, stl = CASES["mixed-chain"](), Reparam(stl=True)
    with pytest.raises(SiteError, match="its law depends on w, which is doubly reparameterised"):
        plan(IWELBO(2, {"w": stl}), case)
    with pytest.raises(SiteError, match=r"is doubly reparameterised .* and this site is not"):
        plan(IWELBO(2, {"u": stl, "w": Reparam()}), CASES["continuous"]())

    def guide():
        place = numpyro.sample("place", dist.Delta(numpyro.param("m", jnp.array(0.2))))
        numpyro.sample("w", dist.Normal(place, 1.0))

    def model():
        numpyro.sample("place", dist.Normal(0.0, 1.0))
        _normal_model()

    gradient = VariationalGradient(IWELBO(2, {"w": stl}), model, guide)
    with pytest.raises(SiteError, match="point mass 'place' of the guide is placed by parameters"):
        gradient.estimate(jax.random.key(0), {"m": jnp.array(0.2)}, {})
