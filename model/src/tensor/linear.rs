//! A linear layer that owns its weights. Hides the weights' layout and type.

use candle_core::{DType, Result, Tensor};

/// `y = x W^T + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    weight: Tensor,
    /// `[out]`, in the type of the activations.
    bias: Option<Tensor>,
}

impl Linear {
    /// Creates a layer from `[out, in]` weights and an `[out]` bias. `compute` is the type of the activations.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, compute: DType) -> Result<Self> {
        Ok(Self { weight, bias: bias.map(|b| b.to_dtype(compute)).transpose()? })
    }

    /// The weights, `[out, in]`, in the type of `x`.
    pub(super) fn weight_as(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.to_dtype(x.dtype())
    }

    /// `[rows, in]` to `[rows, out]`, in the type of `x`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Weights of another type than the activations are converted for this product only, so they stay in memory in
        // their own type.
        let weight =
            if self.weight.dtype() == x.dtype() { self.weight.clone() } else { self.weight.to_dtype(x.dtype())? };
        let y = x.matmul(&weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
