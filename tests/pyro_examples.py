"""Programs of the kinds found among Pyro's examples and tutorials, small, with their fits.

Each function returns a fit and the arguments of its model. Networks are single layers, data are a few rows, and training is a
step or two: what counts is how the programs are written.
"""

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.contrib.cevae import CEVAE, TraceCausalEffect_ELBO
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import (
    CSIS,
    MCMC,
    NUTS,
    SVI,
    Importance,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    init_to_sample,
)
from pyro.infer.reparam import DiscreteCosineReparam, LocScaleReparam, NeuTraReparam, StableReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints


def fit_svi(model, guide, *args, loss=None, steps=2, lr=0.01, **kwargs):
    """Return an SVI after a few steps."""
    svi = SVI(model, guide, Adam({"lr": lr}), loss or Trace_ELBO())
    for _ in range(steps):
        svi.step(*args, **kwargs)
    return svi


def fit_nuts(model, *args, draws=6, warmup=4, **options):
    """Return a short MCMC run."""
    mcmc = MCMC(NUTS(model, **options), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


class Normals(nn.Module):
    """A layer whose outputs are the location and scale of a normal distribution; standard normal if all weights are 0."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.loc, self.log_scale = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, *x):
        x = torch.cat(x, -1)
        return self.loc(x), (0.1 * self.log_scale(x)).exp()


def binary(rows, columns):
    return (torch.rand(rows, columns) < 0.5).float()


# Amortised: variational autoencoders and their kin.


class Autoencoder(nn.Module):
    """A variational autoencoder of binary pixels."""

    def __init__(self, pixels=6, z_dim=2):
        super().__init__()
        self.z_dim = z_dim
        self.encoder, self.decoder = Normals(pixels, z_dim), nn.Sequential(nn.Linear(z_dim, pixels), nn.Sigmoid())

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = x.new_zeros(x.shape[0], self.z_dim), x.new_ones(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            pixels = self.decoder.forward(z)
            pyro.sample("obs", dist.Bernoulli(pixels, validate_args=False).to_event(1), obs=x.reshape(len(x), -1))
            return pixels

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", dist.Normal(*self.encoder(x.reshape(len(x), -1))).to_event(1))


def vae():
    module, x = Autoencoder(), binary(5, 6).reshape(5, 1, 2, 3)
    return fit_svi(module.model, module.guide, x, loss=Trace_ELBO()), (x,)


class SemiSupervised(nn.Module):
    """A variational autoencoder with a class y, observed for some batches; its plate has no size."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2 + 3, 6), nn.Sigmoid())
        self.encoder_y, self.encoder_z = nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1)), Normals(6 + 3, 2)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        batch_size = xs.size(0)
        with pyro.plate("data"):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(batch_size, 2), xs.new_ones(batch_size, 2)).to_event(1))
            prior = xs.new_ones(batch_size, 3) / 3
            ys = pyro.sample("y", dist.OneHotCategorical(prior), obs=ys)
            joined = torch.cat([zs.expand(*ys.shape[:-1], 2), ys], -1)
            pyro.sample("x", dist.Bernoulli(self.decoder(joined)).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.encoder_y(xs)))
            joined = torch.cat([xs.expand(*ys.shape[:-1], 6), ys], -1)
            pyro.sample("z", dist.Normal(*self.encoder_z(joined)).to_event(1))

    def model_classify(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            if ys is not None:
                with poutine.scale(scale=50.0):
                    pyro.sample("y_aux", dist.OneHotCategorical(self.encoder_y(xs)), obs=ys)

    def guide_classify(self, xs, ys=None):
        pass


def one_hot(rows, classes):
    return F.one_hot(torch.arange(rows) % classes, classes).float()


def ss_vae_m2():
    module, x, y = SemiSupervised(), binary(5, 6), one_hot(5, 3)
    guide = config_enumerate(module.guide, "parallel", expand=True)
    svi = fit_svi(module.model, guide, x, loss=TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(x, y)
    return svi, (x, y)


def ss_vae_m2_unlabelled():
    svi, (x, _) = ss_vae_m2()
    return svi, (x,)


def ss_vae_m2_classify():
    module, x, y = SemiSupervised(), binary(5, 6), one_hot(5, 3)
    return fit_svi(module.model_classify, module.guide_classify, x, y), (x, y)


class StructuredPrediction(nn.Module):
    """A conditional autoencoder: the unseen pixels given the seen ones; its plate has no size."""

    def __init__(self):
        super().__init__()
        self.baseline = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())
        self.prior, self.recognition = Normals(6 + 6, 2), Normals(6 + 6, 2)
        self.generation = nn.Sequential(nn.Linear(2, 6), nn.Sigmoid())

    def model(self, xs, ys=None):
        pyro.module("generation_net", self)
        batch_size = xs.shape[0]
        with pyro.plate("data"):
            with torch.no_grad():
                y_hat = self.baseline(xs).view(xs.shape)
            zs = pyro.sample("z", dist.Normal(*self.prior(xs, y_hat)).to_event(1))
            loc = self.generation(zs)
            if ys is not None:
                seen = (xs == -1).view(-1, 6)
                unseen_loc = loc[seen].view(batch_size, -1)
                unseen = ys[xs == -1].view(batch_size, -1)
                pyro.sample("y", dist.Bernoulli(unseen_loc, validate_args=False).to_event(1), obs=unseen)
            else:
                pyro.deterministic("y", loc.detach())
            return loc

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            if ys is None:
                y_hat = self.baseline(xs).view(xs.shape)
                pyro.sample("z", dist.Normal(*self.prior(xs, y_hat)).to_event(1))
            else:
                pyro.sample("z", dist.Normal(*self.recognition(xs, ys)).to_event(1))


def cvae():
    module, y = StructuredPrediction(), binary(5, 6)
    x = y.clone()
    x[:, 2:] = -1
    return fit_svi(module.model, module.guide, x, y), (x, y)


def vae_flow_prior():
    z_dim, pixels = 2, 6
    decoder, encoder = nn.Linear(z_dim, pixels), Normals(pixels, z_dim)
    transform = T.affine_autoregressive(z_dim, hidden_dims=[4])

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("transform", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(z_dim), torch.ones(z_dim)).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [transform]))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    x = binary(5, pixels)
    return fit_svi(model, guide, x), (x,)


def scanvi():
    """Counts of genes by cell, with a cell type that is observed for some batches, and latent library sizes."""
    genes, types, rows = 5, 3, 6
    decoder, classifier = nn.Linear(2, 2 * genes), nn.Linear(2, types)
    z2_given_z1, z1_given_z2 = Normals(2 + types, 2), Normals(2 + types, 2)
    z1_encoder, l_encoder = Normals(genes, 2), Normals(genes, 1)
    networks = nn.ModuleList([decoder, classifier, z2_given_z1, z1_given_z2, z1_encoder, l_encoder])

    def cat(z, y):
        return torch.cat([z.expand(*y.shape[:-1], z.shape[-1]), y], -1)

    def model(x, y=None):
        pyro.module("scanvi", networks)
        theta = pyro.param("inverse_dispersion", torch.ones(genes), constraint=constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=1.0 / genes):
            z2 = pyro.sample("z2", dist.Normal(0, torch.ones(2)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(types)), obs=y)
            z1 = pyro.sample("z1", dist.Normal(*z1_given_z2(cat(z2, y))).to_event(1))
            library = pyro.sample("l", dist.LogNormal(torch.ones(1), 0.5).to_event(1))
            gate_logits, mu = decoder(z1).chunk(2, -1)
            logits = (library * mu.softmax(-1) + 1e-6).log() - (theta + 1e-6).log()
            x_dist = dist.ZeroInflatedNegativeBinomial(
                gate_logits=gate_logits, total_count=theta, logits=logits, validate_args=False
            )
            pyro.sample("x", x_dist.to_event(1), obs=x)

    def guide(x, y=None):
        pyro.module("scanvi", networks)
        with pyro.plate("batch", len(x)), poutine.scale(scale=1.0 / genes):
            z1 = pyro.sample("z1", dist.Normal(*z1_encoder(x.log1p())).to_event(1))
            pyro.sample("l", dist.LogNormal(*l_encoder(x.log1p())).to_event(1))
            y_dist = dist.OneHotCategorical(logits=classifier(z1))
            if y is None:
                y = pyro.sample("y", y_dist)
            else:
                pyro.factor("classification_loss", -0.1 * y_dist.log_prob(y), has_rsample=False)
            pyro.sample("z2", dist.Normal(*z2_given_z1(cat(z1, y))).to_event(1))

    x = torch.poisson(3 * torch.ones(rows, genes))
    loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    svi = fit_svi(model, config_enumerate(guide, "parallel", expand=True), x, one_hot(rows, types), loss=loss)
    return svi, (x, one_hot(rows, types))


def prod_lda():
    words, topics = 6, 2
    encoder, decoder = Normals(words, topics), nn.Sequential(nn.Linear(topics, words), nn.Softmax(-1))

    def model(docs):
        pyro.module("decoder", decoder)
        with pyro.plate("documents", docs.shape[0]):
            logtheta = pyro.sample("logtheta", dist.Normal(docs.new_zeros(len(docs), topics), 1.0).to_event(1))
            total_count = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total_count, decoder(logtheta.softmax(-1))), obs=docs)

    def guide(docs):
        pyro.module("encoder", encoder)
        with pyro.plate("documents", docs.shape[0]):
            pyro.sample("logtheta", dist.Normal(*encoder(docs)).to_event(1))

    docs = torch.poisson(torch.full((5, words), 2.0))
    return fit_svi(model, guide, docs, loss=TraceMeanField_ELBO()), (docs,)


class DeepMarkov(nn.Module):
    """A deep Markov model of padded sequences: sites by time, masks by length, and several row-wise arguments."""

    def __init__(self, notes=4, z_dim=2):
        super().__init__()
        self.transition, self.emitter = Normals(z_dim, z_dim), nn.Sequential(nn.Linear(z_dim, notes), nn.Sigmoid())
        self.rnn, self.combiner = nn.GRU(notes, 3, batch_first=True), Normals(z_dim + 3, z_dim)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(z_dim)), nn.Parameter(torch.zeros(z_dim))

    def model(self, mini_batch, mini_batch_reversed, mini_batch_mask, mini_batch_seq_lengths, annealing_factor=1.0):
        time_steps = mini_batch.size(1)
        pyro.module("dmm", self)
        z_prev = self.z_0.expand(mini_batch.size(0), self.z_0.size(0))
        with pyro.plate("z_minibatch", len(mini_batch)):
            for t in pyro.markov(range(1, time_steps + 1)):
                z_loc, z_scale = self.transition(z_prev)
                mask = mini_batch_mask[:, t - 1 : t]
                with poutine.scale(scale=annealing_factor):
                    z_t = pyro.sample(f"z_{t}", dist.Normal(z_loc, z_scale).mask(mask).to_event(1))
                notes = dist.Bernoulli(self.emitter(z_t)).mask(mask).to_event(1)
                pyro.sample(f"obs_x_{t}", notes, obs=mini_batch[:, t - 1, :])
                z_prev = z_t

    def guide(self, mini_batch, mini_batch_reversed, mini_batch_mask, mini_batch_seq_lengths, annealing_factor=1.0):
        pyro.module("dmm", self)
        hidden = self.rnn(mini_batch_reversed)[0].flip(1)
        z_prev = self.z_q_0.expand(mini_batch.size(0), self.z_q_0.size(0))
        with pyro.plate("z_minibatch", len(mini_batch)):
            for t in pyro.markov(range(1, mini_batch.size(1) + 1)):
                z_loc, z_scale = self.combiner(z_prev, hidden[:, t - 1].expand(*z_prev.shape[:-1], 3))
                with poutine.scale(scale=annealing_factor):
                    mask = mini_batch_mask[:, t - 1 : t]
                    z_prev = pyro.sample(f"z_{t}", dist.Normal(z_loc, z_scale).mask(mask).to_event(1))


def music(rows=5, time_steps=3, notes=4):
    """Return padded sequences, reversed ones, their mask, and their lengths."""
    lengths = torch.tensor([3, 3, 2, 2, 1])[:rows]
    mask = (torch.arange(time_steps) < lengths[:, None]).float()
    x = (torch.rand(rows, time_steps, notes) < 0.5).float() * mask[..., None]
    return x, x.flip(1), mask, lengths


def dmm():
    module, args = DeepMarkov(), music()
    return fit_svi(module.model, module.guide, *args, 0.5), args


class Air(nn.Module):
    """Attend, infer, repeat: Bernoulli steps whose guide, but not the model, subsamples."""

    def __init__(self):
        super().__init__()
        self.decode, self.encode, self.baseline = nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(4, 1)

    def model(self, data, batch_size, **kwargs):
        pyro.module("decode", self.decode)
        with pyro.plate("data", data.size(0), device=data.device) as ix:
            batch = data[ix]
            n, x = batch.size(0), 0.0
            z_pres = torch.ones(n, 1)
            for t in range(2):
                z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.5 * z_pres).to_event(1))
                z_what = dist.Normal(torch.zeros(n, 2), 1.0).mask(z_pres.bool()).to_event(1)
                z_what = pyro.sample(f"z_what_{t}", z_what)
                x = x + z_pres * self.decode(z_what)
            pyro.sample("obs", dist.Normal(x, 0.3).to_event(1), obs=batch)

    def guide(self, data, batch_size, **kwargs):
        pyro.module("encode", self.encode)
        pyro.module("baseline", self.baseline, update_module_params=True)
        with pyro.plate("data", data.size(0), subsample_size=batch_size, device=data.device) as ix:
            batch = data[ix]
            z_pres = torch.ones(len(batch), 1)
            for t in range(2):
                logit, loc, raw = self.encode(batch).split([1, 2, 2], -1)
                baseline = {"baseline_value": self.baseline(batch).squeeze(-1)}
                z_pres = pyro.sample(
                    f"z_pres_{t}",
                    dist.Bernoulli(logit.sigmoid() * z_pres).to_event(1),
                    infer={"baseline": baseline},
                )
                pyro.sample(f"z_what_{t}", dist.Normal(loc, raw.exp()).mask(z_pres.bool()).to_event(1))


def air():
    module, x = Air(), torch.randn(6, 4)
    return fit_svi(module.model, module.guide, x, batch_size=4, loss=TraceGraph_ELBO()), (x, 4)


def cevae():
    """Pyro's CEVAE, whose plate is given data in the place of indices."""
    module = CEVAE(feature_dim=3, outcome_dist="normal", latent_dim=2, hidden_dim=4, num_layers=2, num_samples=2)
    x, t = torch.randn(6, 3), (torch.arange(6) % 2).float()
    y = x[:, 0] + t
    module.whiten = lambda x: x
    return fit_svi(module.model, module.guide, x, t, y, size=6, loss=TraceCausalEffect_ELBO()), (x, t, y)


# Enumerated.


def gmm():
    k, x = 2, torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(k)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", k):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoNormal(poutine.block(model, expose=["weights", "locs", "scale"]))
    return fit_svi(model, guide, x, loss=TraceEnum_ELBO(max_plate_nesting=1)), (x,)


def hmm_data():
    lengths = torch.tensor([4, 3, 2, 4])
    sequences = (torch.rand(4, 4, 3) < 0.4).float()
    return sequences, lengths


def hmm_model(sequences, lengths, hidden_dim=2, batch_size=None, include_prior=True):
    num_sequences, _, data_dim = sequences.shape
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(hidden_dim) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([hidden_dim, data_dim]).to_event(2))
    tones_plate = pyro.plate("tones", data_dim, dim=-1)
    with pyro.plate("sequences", num_sequences, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x = 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones_plate:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[batch, t])


def _hmm(**kwargs):
    args = hmm_data()
    guide = AutoDelta(poutine.block(hmm_model, expose=["probs_x", "probs_y"]), init_loc_fn=init_to_sample)
    return fit_svi(hmm_model, guide, *args, loss=TraceEnum_ELBO(max_plate_nesting=2), **kwargs), args


def hmm():
    return _hmm()


def hmm_in_batches():
    return _hmm(batch_size=2)


def gaussian_hmm():
    """A Kalman filter: the states are summed out inside the distribution."""

    def model(data):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        eye = torch.eye(2)
        init = dist.MultivariateNormal(torch.zeros(2), eye)
        trans = dist.MultivariateNormal(torch.zeros(2), scale[..., None, None, None] * eye)
        obs = dist.MultivariateNormal(torch.zeros(2), eye)
        hmm_dist = dist.GaussianHMM(init, eye, trans, eye, obs, duration=4)
        with pyro.plate("series", len(data)):
            pyro.sample("obs", hmm_dist, obs=data)

    x = torch.randn(3, 4, 2)
    return fit_svi(model, AutoNormal(model), x), (x,)


def mixed_hmm():
    """Discrete random effects of groups and individuals on a hidden Markov model, with missing values."""
    groups, individuals, time_steps, states = 2, 3, 3, 2

    def model(steps, missing):
        probs_e = pyro.param("probs_e_group", torch.ones(2) / 2, constraint=constraints.simplex)
        theta = pyro.param("theta_g", torch.randn(2))
        gamma = pyro.param("gamma", torch.zeros(states, states))
        with pyro.plate("group", groups, dim=-1):
            e_g = pyro.sample("e_g", dist.Categorical(probs_e), infer={"enumerate": "parallel"})
            eps_g = theta[e_g]
            with pyro.plate("individual", individuals, dim=-2):
                y = torch.tensor(0)
                for t in pyro.markov(range(time_steps)):
                    logits = Vindex(gamma)[..., y, :] + eps_g.unsqueeze(-1) * torch.arange(states)
                    y = pyro.sample(f"y_{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                    scale = Vindex(pyro.param("scale", torch.ones(states), constraint=constraints.positive))[..., y]
                    with poutine.mask(mask=~missing[..., t]):
                        pyro.sample(f"step_{t}", dist.Gamma(scale, 1.0), obs=steps[..., t])

    def guide(steps, missing):
        pass

    steps = torch.rand(individuals, groups, time_steps) + 0.1
    missing = torch.zeros(individuals, groups, time_steps, dtype=torch.bool)
    missing[0, 0, 2] = True
    return fit_svi(model, guide, steps, missing, loss=TraceEnum_ELBO(max_plate_nesting=2)), (steps, missing)


def lda():
    """Latent Dirichlet allocation, amortised: only the guide subsamples, and documents are the last dimension."""
    topics, vocabulary, documents, words_per_doc = 2, 5, 6, 4
    predictor = nn.Sequential(nn.Linear(vocabulary, topics), nn.Softmax(-1))

    def model(data=None, batch_size=None):
        with pyro.plate("topics", topics):
            topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / topics, 1.0))
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(vocabulary) / vocabulary))
        with pyro.plate("documents", documents) as ind:
            if data is not None:
                data = data[:, ind]
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
            with pyro.plate("words", words_per_doc):
                word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"})
                return pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)

    def guide(data, batch_size=None):
        positive = {"constraint": constraints.positive}
        weights = pyro.param("topic_weights_posterior", lambda: torch.ones(topics), **positive)
        words = pyro.param(
            "topic_words_posterior", lambda: torch.ones(topics, vocabulary), constraint=constraints.greater_than(0.5)
        )
        with pyro.plate("topics", topics):
            pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
            pyro.sample("topic_words", dist.Dirichlet(words))
        pyro.module("predictor", predictor)
        with pyro.plate("documents", documents, batch_size) as ind:
            data = data[:, ind]
            counts = torch.zeros(vocabulary, len(ind)).scatter_add(0, data, torch.ones(data.shape))
            pyro.sample("doc_topics", dist.Delta(predictor(counts.transpose(0, 1)), event_dim=1))

    data = torch.randint(0, vocabulary, (words_per_doc, documents))
    return fit_svi(model, guide, data, batch_size=3, loss=TraceEnum_ELBO(max_plate_nesting=2)), (data,)


def capture_recapture():
    """Cormack, Jolly and Seber's model: alive or dead, summed out, and seen or not."""

    def model(capture_history):
        animals, occasions = capture_history.shape
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", animals, dim=-1):
            z = torch.ones(animals)
            first_capture_mask = torch.zeros(animals).bool()
            for t in pyro.markov(range(occasions)):
                with poutine.mask(mask=first_capture_mask):
                    mu_z = first_capture_mask.float() * phi * z + (1 - first_capture_mask.float())
                    z = pyro.sample(f"z_{t}", dist.Bernoulli(mu_z), infer={"enumerate": "parallel"})
                    pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
                first_capture_mask |= capture_history[:, t].bool()

    history = (torch.rand(5, 3) < 0.6).float()
    guide = AutoDiagonalNormal(poutine.block(model, expose=["phi", "rho"]))
    return fit_svi(model, guide, history, loss=TraceEnum_ELBO(max_plate_nesting=1)), (history,)


def dirichlet_process():
    def mix_weights(beta):
        beta1m_cumprod = (1 - beta).cumprod(-1)
        return F.pad(beta, (0, 1), value=1) * F.pad(beta1m_cumprod, (1, 0), value=1)

    components = 3

    def model(data):
        with pyro.plate("beta_plate", components - 1):
            beta = pyro.sample("beta", dist.Beta(1, 0.5))
        with pyro.plate("mu_plate", components):
            mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2)))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(mix_weights(beta)))
            pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=data)

    def guide(data):
        kappa = pyro.param("kappa", lambda: torch.ones(components - 1), constraint=constraints.positive)
        tau = pyro.param("tau", lambda: torch.randn(components, 2))
        phi = pyro.param("phi", lambda: torch.ones(len(data), components) / components, constraint=constraints.simplex)
        with pyro.plate("beta_plate", components - 1):
            pyro.sample("beta", dist.Beta(torch.ones(components - 1), kappa))
        with pyro.plate("mu_plate", components):
            pyro.sample("mu", dist.MultivariateNormal(tau, torch.eye(2)))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Categorical(phi))

    x = torch.randn(5, 2)
    return fit_svi(model, guide, x), (x,)


# Regressions and hierarchies.


def bayesian_regression():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", x.shape[0]):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
            return mean

    model, x = Regression(), torch.randn(6, 2)
    y = x.sum(1)
    return fit_svi(model, AutoDiagonalNormal(model), x, y), (x, y)


def intro():
    """A regression with parameters only, and one with an interaction (the first tutorial)."""

    def model(is_cont_africa, ruggedness, log_gdp=None):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b_a, b_r, b_ar = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("bA", "bR", "bAR"))
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = a + b_a * is_cont_africa + b_r * ruggedness + b_ar * is_cont_africa * ruggedness
        with pyro.plate("data", len(ruggedness)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)

    africa, rugged = torch.tensor([0.0, 1, 0, 1, 1]), torch.rand(5)
    gdp = 8 + rugged
    return fit_svi(model, AutoNormal(model), africa, rugged, gdp), (africa, rugged, gdp)


def intro_maximum_likelihood():
    def simple_model(is_cont_africa, ruggedness, log_gdp=None):
        a = pyro.param("a", lambda: torch.randn(()))
        b_a = pyro.param("bA", lambda: torch.randn(()))
        sigma = pyro.param("sigma", lambda: torch.ones(()), constraint=constraints.positive)
        mean = a + b_a * is_cont_africa
        with pyro.plate("data", len(ruggedness)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)

    def empty_guide(is_cont_africa, ruggedness, log_gdp):
        pass

    _, args = intro()
    return fit_svi(simple_model, empty_guide, *args), args


def weighing():
    """An object on a scale: the measurement is conditioned, and the model has no plates."""

    def scale(guess):
        weight = pyro.sample("weight", dist.Normal(guess, 1.0))
        return pyro.sample("measurement", dist.Normal(weight, 0.75))

    def guide(guess):
        a = pyro.param("a", torch.tensor(guess))
        b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
        return pyro.sample("weight", dist.Normal(a, b))

    conditioned = pyro.condition(scale, data={"measurement": torch.tensor(9.5)})
    return fit_svi(conditioned, guide, 8.5), (8.5,)


def coin():
    """A coin's fairness: sites by name in a Python loop, no plate (SVI tutorial, part I)."""

    def model(data):
        f = pyro.sample("latent_fairness", dist.Beta(torch.tensor(10.0), torch.tensor(10.0)))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    def guide(data):
        alpha = pyro.param("alpha_q", torch.tensor(15.0), constraint=constraints.positive)
        beta = pyro.param("beta_q", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("latent_fairness", dist.Beta(alpha, beta))

    data = torch.tensor([1.0, 1, 1, 0])
    return fit_svi(model, guide, data), (data,)


def coin_loop():
    """The same in a sequential plate that subsamples (SVI tutorial, part II)."""

    def model(data):
        f = pyro.sample("latent_fairness", dist.Beta(torch.tensor(10.0), torch.tensor(10.0)))
        for i in pyro.plate("data_loop", len(data), subsample_size=2):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    _, (data,) = coin()
    return fit_svi(model, AutoNormal(model), data), (data,)


def coin_subsampled():
    """The same in a vectorised plate that subsamples."""

    def model(data):
        f = pyro.sample("latent_fairness", dist.Beta(torch.tensor(10.0), torch.tensor(10.0)))
        with pyro.plate("observe_data", len(data), subsample_size=2) as ind:
            pyro.sample("obs", dist.Bernoulli(f), obs=data.index_select(0, ind))

    _, (data,) = coin()
    return fit_svi(model, AutoNormal(model), data), (data,)


def minipyro():
    def model(data):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), dim=-1):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)

    def guide(data):
        guide_loc = pyro.param("guide_loc", torch.tensor(0.0))
        guide_scale = pyro.param("guide_scale_log", torch.tensor(0.0)).exp()
        pyro.sample("loc", dist.Normal(guide_loc, guide_scale))

    x = 3 + torch.randn(6)
    return fit_svi(model, guide, x), (x,)


def eight_schools():
    y, sigma = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(sigma, y=None):
        eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10 * torch.ones(1)).to_event(1))
        tau = pyro.sample("tau", dist.HalfCauchy(scale=25 * torch.ones(1)).to_event(1))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)

    def guide(sigma, y=None):
        pyro.sample("eta", dist.Normal(pyro.param("m_eta", torch.zeros(8)), 1.0).to_event(1))
        pyro.sample("mu", dist.Normal(pyro.param("m_mu", torch.zeros(1)), 1.0).to_event(1))
        log_tau = dist.Normal(pyro.param("m_log_tau", torch.zeros(1)), 1.0).to_event(1)
        pyro.sample("tau", dist.TransformedDistribution(log_tau, T.ExpTransform()))

    return fit_svi(model, guide, sigma, y), (sigma, y)


def baseball():
    """Partially pooled batting averages by NUTS, conditioned from outside."""
    at_bats, hits = torch.tensor([45.0, 45, 45, 45]), torch.tensor([18.0, 17, 16, 12])

    def partially_pooled(at_bats, hits):
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("num_players", at_bats.shape[0]):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            return pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)

    def conditioned_model(model, at_bats, y):
        return poutine.condition(model, data={"hits": y})(at_bats, None)

    return fit_nuts(conditioned_model, partially_pooled, at_bats, hits), (partially_pooled, at_bats, hits)


def lkj():
    dims, x = 3, torch.randn(6, 3)

    def model(y):
        with pyro.plate("dims", dims):
            theta = pyro.sample("theta", dist.HalfCauchy(1.0))
        l_omega = pyro.sample("L_omega", dist.LKJCholesky(dims, torch.tensor(1.0)))
        scale_tril = torch.mm(torch.diag(theta.sqrt()), l_omega)
        with pyro.plate("observations", len(y)):
            return pyro.sample("obs", dist.MultivariateNormal(torch.zeros(dims), scale_tril=scale_tril), obs=y)

    return fit_nuts(model, x, jit_compile=False), (x,)


def radon():
    county, floor = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([0.0, 1, 0, 1, 0, 0, 1])
    log_radon = torch.tensor([1.2, 0.3, 0.9, 0.5, 1.6, 1.1, 0.2])

    def model(county, floor, log_radon=None):
        mu_a, sigma_a = pyro.sample("mu_a", dist.Normal(0.0, 1.0)), pyro.sample("sigma_a", dist.HalfCauchy(1.0))
        b, sigma = pyro.sample("b", dist.Normal(0.0, 1.0)), pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("counties", 3):
            a = pyro.sample("a", dist.Normal(mu_a, sigma_a))
        with pyro.plate("houses", len(county)):
            mean = pyro.deterministic("mean", a[..., county] + b * floor)
            pyro.sample("log_radon", dist.Normal(mean, sigma), obs=log_radon)

    model = poutine.reparam(model, config={"a": LocScaleReparam(0.0)})
    args = (county, floor, log_radon)
    return fit_svi(model, AutoNormal(model), *args), args


def sparse_gamma_def():
    """A deep exponential family of counts: a module with plates over data and over weights."""
    rows, pixels, top, bottom = 4, 5, 2, 3

    def model(x):
        with pyro.plate("w_top_plate", top * bottom):
            w_top = pyro.sample("w_top", dist.Gamma(0.1, 0.3))
        with pyro.plate("w_bottom_plate", bottom * pixels):
            w_bottom = pyro.sample("w_bottom", dist.Gamma(0.1, 0.3))
        with pyro.plate("data", x.size(0)):
            z_top = pyro.sample("z_top", dist.Gamma(0.1, 0.1).expand([top]).to_event(1))
            w_top = w_top.reshape(top, bottom) if w_top.dim() == 1 else w_top.unflatten(-1, (top, bottom))
            mean_bottom = torch.matmul(z_top, w_top)
            z_bottom = pyro.sample("z_bottom", dist.Gamma(0.1, 0.1 / mean_bottom).to_event(1))
            w_bottom = w_bottom.reshape(bottom, pixels) if w_bottom.dim() == 1 else w_bottom.unflatten(-1, (bottom, pixels))
            mean_obs = torch.matmul(z_bottom, w_bottom)
            pyro.sample("obs", dist.Poisson(mean_obs).to_event(1), obs=x)

    x = torch.poisson(3 * torch.rand(rows, pixels))
    guide = AutoNormal(model, init_loc_fn=lambda site: site["fn"].mean.clamp(0.5, 2.0).detach())
    return fit_svi(model, guide, x), (x,)


def stable():
    """Log returns under Levy's stable distribution, with a volatility in the cosine basis."""
    returns = torch.tensor([0.1, -0.2, 0.05, 1.0, -0.1, 0.02])

    @poutine.reparam(config={"v": DiscreteCosineReparam(), "r": StableReparam()})
    def model(data):
        h_0 = pyro.sample("h_0", dist.Normal(0, 1)).unsqueeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(0, 1)).unsqueeze(-1)
        v = pyro.sample("v", dist.Normal(0, sigma).expand([len(data)]).to_event(1))
        log_h = h_0 + v.cumsum(dim=-1)
        sqrt_h = log_h.mul(0.5).exp().clamp(min=1e-8, max=1e8)
        stability = pyro.sample("r_s", dist.Uniform(0, 2)).unsqueeze(-1)
        skew = pyro.sample("r_skew", dist.Uniform(-1, 1)).unsqueeze(-1)
        pyro.sample("r", dist.Stable(stability, skew, sqrt_h, 0.0).to_event(1), obs=data)

    return fit_svi(model, AutoLowRankMultivariateNormal(model), returns), (returns,)


def stable_iid():
    """Independent returns whose scale may leave the domain of the distribution under the prior."""
    returns = torch.tensor([0.1, -0.2, 0.05, 1.0, -0.1, 0.02])

    @poutine.reparam(config={"r": StableReparam()})
    def model(data):
        stability = pyro.sample("stability", dist.Uniform(0.0, 2.0))
        scale = pyro.sample("scale", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("r", dist.Stable(stability, 0.0, scale, 0.0), obs=data)

    guide = AutoNormal(model, init_loc_fn=lambda site: torch.full(site["fn"].shape(), 1.2), init_scale=0.01)
    return fit_svi(model, guide, returns), (returns,)


def svi_flow_guide():
    """A sparse regression with a guide of Pyro's own normalizing flow, split into two variables."""
    x, y = torch.randn(6, 2), torch.randn(6)
    flow = T.affine_autoregressive(4, hidden_dims=[8])

    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            mean = (x * (beta * log_scale.exp()).unsqueeze(-2)).sum(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def guide(x, y):
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(4), 0.1).to_event(1)
        both = pyro.sample("both", dist.TransformedDistribution(base, [flow]), infer={"is_auxiliary": True})
        pyro.sample("beta", dist.Delta(both[..., :2], event_dim=1))
        pyro.sample("log_scale", dist.Delta(both[..., 2:], event_dim=1))

    return fit_svi(model, guide, x, y), (x, y)


def guide_list():
    """A model with a discrete and a continuous latent variable under an AutoGuideList."""
    x = torch.randn(5)

    def model(data):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(loc, scale), obs=data)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["loc"])))
    guide.append(AutoDelta(poutine.block(model, expose=["scale"])))
    return fit_svi(model, guide, x), (x,)


def neutra():
    def dogleg(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x[..., 0] + x[..., 1] ** 2, 0.5), obs=y)

    y = torch.randn(4)
    guide = AutoDiagonalNormal(dogleg)
    fit_svi(dogleg, guide, y)
    return fit_nuts(NeuTraReparam(guide.requires_grad_(False)).reparam(dogleg), y), (y,)


# Inference of other kinds.


def csis():
    """Inference compilation: the guide is a network of the observations, given by a keyword."""

    class InferenceNetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.normals = Normals(2, 1)

        def forward(self, prior_mean, observations):
            pyro.module("guide", self)
            x = torch.stack([observations["x1"], observations["x2"]]).view(1, 2)
            loc, scale = self.normals(x)
            pyro.sample("z", dist.Normal(loc[0, 0], scale[0, 0]))

    def model(prior_mean, observations={"x1": 0, "x2": 0}):  # noqa: B006
        z = pyro.sample("z", dist.Normal(prior_mean, torch.tensor(5**0.5)))
        for name in ("x1", "x2"):
            pyro.sample(name, dist.Normal(z, torch.tensor(2**0.5)), obs=observations[name])
        return z

    observations = {"x1": torch.tensor(8.0), "x2": torch.tensor(9.0)}
    fit = CSIS(model, InferenceNetwork(), Adam({"lr": 1e-3}), num_inference_samples=6, training_batch_size=3)
    fit.step(torch.tensor(1.0))
    fit.run(torch.tensor(1.0), observations=observations)
    return fit, ()


def inclined_plane():
    """Importance sampling by a model with a loop of sites."""

    def model(observed):
        mu = pyro.sample("mu", dist.Uniform(0.0, 1.0))
        for i, t in enumerate(observed):
            pyro.sample(f"obs_{i}", dist.Normal(1 + mu, 0.2), obs=t)

    observed = torch.tensor([1.4, 1.5, 1.6])
    fit = Importance(model, num_samples=8)
    fit.run(observed)
    return fit, ()


def gp_regression():
    x = torch.linspace(0, 1, 5)
    y = x.sin()
    module = gp.models.GPRegression(x, y, gp.kernels.RBF(1), noise=torch.tensor(0.1))
    module.kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    module.kernel.autoguide("lengthscale", dist.Normal)
    return fit_svi(module.model, module.guide), ()


def gp_sparse():
    x = torch.linspace(0, 1, 5)
    module = gp.models.VariationalSparseGP(
        x, x.sin(), gp.kernels.RBF(1), Xu=x[::2].clone(), likelihood=gp.likelihoods.Gaussian()
    )
    return fit_svi(module.model, module.guide), ()


def sir():
    """Pyro's compartmental model of an epidemic, which holds its own draws."""
    model = SimpleSIRModel(population=50, recovery_time=2.0, data=torch.tensor([1.0, 2.0, 3.0, 2.0]))
    model.fit_svi(num_samples=5, num_steps=2, num_particles=2)
    return model, ()


def sir_by_nuts():
    model = SimpleSIRModel(population=50, recovery_time=2.0, data=torch.tensor([1.0, 2.0, 3.0, 2.0]))
    return model.fit_mcmc(num_samples=4, warmup_steps=2, num_quant_bins=1, disable_progbar=True), ()


def forecast():
    """Pyro's forecaster: a local level model of a series with covariates."""

    class Level(ForecastingModel):
        def model(self, zero_data, covariates):
            scale = pyro.sample("drift_scale", dist.LogNormal(-2.0, 1.0))
            with self.time_plate:
                drift = pyro.sample("drift", dist.Normal(0.0, scale))
            level = drift.cumsum(-1).unsqueeze(-1)
            noise = pyro.sample("noise_scale", dist.LogNormal(0.0, 1.0)).unsqueeze(-1).unsqueeze(-1)
            self.predict(dist.Normal(0.0, noise), level)

    data, covariates = torch.randn(6, 1), torch.zeros(6, 0)
    fit = Forecaster(Level(), data, covariates, num_steps=2, log_every=0)
    return fit, (data, covariates)
