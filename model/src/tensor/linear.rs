//! A linear layer that owns its weights. No caller sees their layout or type.

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
    /// From `[out, in]` weights and `[out]` bias; activations will come in `compute`.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, compute: DType) -> Result<Self> {
        Ok(Self { weight, bias: bias.map(|b| b.to_dtype(compute)).transpose()? })
    }

    /// `[rows, in]` to `[rows, out]`, in the type of `x`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Weights narrower than the activations are widened for the product alone: memory holds them as they are.
        let weight =
            if self.weight.dtype() == x.dtype() { self.weight.clone() } else { self.weight.to_dtype(x.dtype())? };
        let y = x.matmul(&weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
