//! A linear layer that owns its weights. Hides the weights' layout and type.

use candle_core::{DType, Result, Tensor};

use super::trained::TrainedLinear;

/// `y = x W^T + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    weight: Tensor,
    /// `[out]`, in the type of the activations.
    bias: Option<Tensor>,
    /// Sums of the gradients of weight and bias, that the backward pass adds to. `None`: gradients, if any, are candle's.
    sums: Option<(Tensor, Option<Tensor>)>,
}

impl Linear {
    /// Creates a layer from `[out, in]` weights and an `[out]` bias. `compute` is the type of the activations.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, compute: DType) -> Result<Self> {
        Ok(Self { weight, bias: bias.map(|b| b.to_dtype(compute)).transpose()?, sums: None })
    }

    /// Gives the layer sums of gradients. Weights, activations and sums are f32 on the CPU.
    pub(super) fn summed(self, of_weight: Tensor, of_bias: Option<Tensor>) -> Self {
        Self { sums: Some((of_weight, of_bias)), ..self }
    }

    /// The weights in the type of `x`, and the sum of their gradients.
    pub(super) fn weight(&self, x: &Tensor) -> Result<(Tensor, Option<&Tensor>)> {
        Ok((self.weight.to_dtype(x.dtype())?, self.sums.as_ref().map(|(weight, _)| weight)))
    }

    /// `[rows, in]` to `[rows, out]`, in the type of `x`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some((of_weight, of_bias)) = &self.sums {
            let bias = self.bias.as_ref().zip(of_bias.as_ref());
            return x.contiguous()?.apply_op1(TrainedLinear {
                weight: [self.weight.detach(), of_weight.clone()],
                bias: bias.map(|(bias, sum)| [bias.detach(), sum.clone()]),
            });
        }
        // Weights of another type than the activations are converted for this product only, so they stay in memory in
        // their own type.
        let y = x.matmul(&self.weight.to_dtype(x.dtype())?.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
