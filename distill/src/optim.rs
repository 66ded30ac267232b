//! AdamW, gradient clipping and the learning-rate schedule. The optimiser's state is exposed, for checkpoints.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore, bail};
use overfill_model::{AdamStep, GradientSums, add_in_place, square_sum, zero_in_place};

/// Settings of the optimiser.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct OptimConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices. Norms and biases are not decayed.
    pub weight_decay: f64,
    /// Maximum norm of the whole gradient. 0 disables clipping.
    pub clip: f64,
    /// Number of linear warm-up steps.
    pub warmup_steps: usize,
    /// Total number of steps. The cosine schedule ends there.
    pub total_steps: usize,
    /// Final learning rate of the cosine schedule, as a fraction of the peak.
    pub final_share: f64,
}

impl OptimConfig {
    /// Learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.learning_rate * (self.final_share + (1.0 - self.final_share) * cosine)
    }
}

/// Trainable parameters by Hugging Face name. Always f32.
pub type Params = BTreeMap<String, Var>;

/// Gradients summed over micro-batches, by parameter name. On CPUs, backward passes add to most of them in place.
pub struct Gradients(GradientSums);

impl Gradients {
    /// Starts at zero.
    pub fn new(params: &Params) -> Result<Self> {
        let zeros = |(name, var): (&String, &Var)| Ok((name.clone(), var.zeros_like()?));
        Ok(Self(params.iter().map(zeros).collect::<Result<_>>()?))
    }

    /// The sums, by parameter name.
    pub fn sums(&self) -> &GradientSums {
        &self.0
    }

    /// Adds the gradients that a backward pass returned.
    pub fn add(&mut self, params: &Params, grads: &GradStore) -> Result<()> {
        for (name, var) in params {
            if let (Some(grad), Some(sum)) = (grads.get(var), self.0.get_mut(name)) {
                add_in_place(sum, grad)?;
            }
        }
        Ok(())
    }

    /// Euclidean norm of the gradients of all parameters.
    fn norm(&self, params: &Params) -> Result<f64> {
        let sums = params.keys().filter_map(|name| self.0.get(name));
        Ok(sums.map(square_sum).sum::<Result<f64>>()?.sqrt())
    }
}

/// AdamW optimiser (Loshchilov and Hutter): Adam with decoupled weight decay.
pub struct AdamW {
    config: OptimConfig,
    moments: BTreeMap<String, (Tensor, Tensor)>,
    step: usize,
}

impl AdamW {
    /// Starts with both moments at zero.
    pub fn new(config: OptimConfig, params: &Params) -> Result<Self> {
        let zeros = |var: &Var| -> Result<_> { Ok((var.zeros_like()?, var.zeros_like()?)) };
        let moments = params.iter().map(|(name, var)| Ok((name.clone(), zeros(var)?))).collect::<Result<_>>()?;
        Ok(Self { config, moments, step: 0 })
    }

    /// Number of updates done.
    pub fn step(&self) -> usize {
        self.step
    }

    /// Applies one update. The summed gradients are multiplied by `scale` first (one over the number of summed tokens), and
    /// start at zero again afterwards. Returns the norm of the scaled gradient before clipping.
    pub fn update(&mut self, params: &Params, grads: &mut Gradients, scale: f64) -> Result<f64> {
        let norm = grads.norm(params)? * scale;
        if !norm.is_finite() {
            bail!("training diverged: gradient norm is {norm} at step {}", self.step);
        }
        let c = &self.config;
        let rate = c.rate(self.step);
        self.step += 1;
        let step = AdamStep {
            factor: if c.clip > 0.0 && norm > c.clip { scale * c.clip / norm } else { scale },
            betas: [c.beta1, c.beta2],
            biases: [c.beta1, c.beta2].map(|beta| 1.0 - beta.powi(self.step as i32)),
            eps: c.eps,
            rate,
            kept: 1.0,
        };
        for (name, var) in params {
            let (Some(grad), Some(moments)) = (grads.0.get_mut(name), self.moments.get_mut(name)) else { continue };
            let kept = if var.rank() > 1 { 1.0 - rate * c.weight_decay } else { 1.0 };
            AdamStep { kept, ..step }.apply(var, grad, moments)?;
            zero_in_place(grad)?;
        }
        Ok(norm)
    }

    /// Returns the state for a checkpoint: tensors `first.NAME` and `second.NAME`.
    pub fn state(&self) -> HashMap<String, Tensor> {
        let both = |(name, (first, second)): (&String, &(Tensor, Tensor))| {
            [(format!("first.{name}"), first.clone()), (format!("second.{name}"), second.clone())]
        };
        self.moments.iter().flat_map(both).collect()
    }

    /// Restores the state of a checkpoint written after `step` updates.
    pub fn restore(&mut self, mut state: HashMap<String, Tensor>, step: usize, device: &Device) -> Result<()> {
        for (name, moments) in &mut self.moments {
            let mut take = |kind: &str| match state.remove(&format!("{kind}.{name}")) {
                Some(t) if t.shape() == moments.0.shape() => t.to_device(device)?.to_dtype(DType::F32),
                Some(t) => bail!("checkpoint: {kind}.{name} has shape {:?}, expected {:?}", t.dims(), moments.0.dims()),
                None => bail!("checkpoint: {kind}.{name} is missing"),
            };
            let pair = (take("first")?, take("second")?);
            *moments = pair;
        }
        self.step = step;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> OptimConfig {
        OptimConfig {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
            warmup_steps: 4,
            total_steps: 20,
            final_share: 0.05,
        }
    }

    #[test]
    fn the_rate_rises_then_falls_to_its_share() {
        let c = config();
        assert!((c.rate(0) - 0.025).abs() < 1e-12);
        assert!((c.rate(4) - 0.1).abs() < 1e-12);
        assert!((c.rate(20) - 0.005).abs() < 1e-12);
        assert!((4..20).all(|s| c.rate(s) >= c.rate(s + 1)));
    }

    /// Compares with two updates computed in f64: clipping, both moments, bias correction, and decay of matrices only.
    #[test]
    fn updates_equal_the_formula() {
        let device = Device::Cpu;
        let w = Var::from_tensor(&Tensor::new(&[[1.0f32, -2.0]], &device).unwrap()).unwrap();
        let b = Var::from_tensor(&Tensor::new(&[0.5f32], &device).unwrap()).unwrap();
        let params: Params = [("w".to_string(), w.clone()), ("b".to_string(), b.clone())].into();
        let c = config();
        let mut adam = AdamW::new(c.clone(), &params).unwrap();
        let mut grads = Gradients::new(&params).unwrap();
        let mut expected = [1.0f64, -2.0, 0.5];
        let (mut m, mut v) = ([0.0f64; 3], [0.0f64; 3]);
        for step in 0..2 {
            // loss = sum(w^2) * 3 + b * 2: gradient 6w and 2.
            let loss =
                ((w.sqr().unwrap().sum_all().unwrap() * 3.0).unwrap() + (b.sum_all().unwrap() * 2.0).unwrap()).unwrap();
            grads.add(&params, &loss.backward().unwrap()).unwrap();
            adam.update(&params, &mut grads, 1.0).unwrap();
            assert_eq!(grads.norm(&params).unwrap(), 0.0);

            let mut g = [6.0 * expected[0], 6.0 * expected[1], 2.0];
            let norm = g.iter().map(|x| x * x).sum::<f64>().sqrt();
            g.iter_mut().for_each(|x| *x *= (1.0 / norm).min(1.0));
            for i in 0..3 {
                m[i] = 0.9 * m[i] + 0.1 * g[i];
                v[i] = 0.98 * v[i] + 0.02 * g[i] * g[i];
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(step + 1)), v[i] / (1.0 - 0.98f64.powi(step + 1)));
                let rate = c.rate(step as usize);
                let decay = if i < 2 { 1.0 - rate * 0.01 } else { 1.0 };
                expected[i] = expected[i] * decay - rate * mh / (vh.sqrt() + 1e-8);
            }
        }
        let mut got = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        got.extend(b.to_vec1::<f32>().unwrap());
        for (g, e) in got.iter().zip(expected) {
            assert!((f64::from(*g) - e).abs() < 1e-5, "{got:?} {expected:?}");
        }
    }
}
