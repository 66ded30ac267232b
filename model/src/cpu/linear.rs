//! A linear layer: packed weights and a bias. Hides the weights' layout and type.

use crate::{
    Activation, ModelError, Parameter,
    cpu::kernels::{
        inputs::InputBuffer,
        matmul::multiply,
        packed::{Arithmetic, PANEL, Packed, WeightFormat},
        rows::GateMul,
    },
    source::{Source, Sources},
};

/// `y = x W^T + b`.
pub(crate) struct Linear {
    matrix: Packed,
    /// `[out]`.
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// One layer from the concatenated rows of several parameters.
    pub(crate) fn load(
        find: &Sources<'_>,
        format: WeightFormat,
        parameters: &[Parameter],
        layer: Option<usize>,
    ) -> Result<Self, ModelError> {
        let sources = find.weights_of(parameters, layer)?;
        let bias = find.biases(parameters, &sources, layer)?.map(|biases| biases.concat());
        let columns = sources[0].inputs();
        let rows = sources.iter().map(Source::outputs).sum();
        let matrix = Packed::pack(format, rows, columns, |panel, out| {
            let wanted = panel * PANEL..(panel + 1) * PANEL;
            let mut first = 0;
            for source in &sources {
                let of = |row: usize| row.saturating_sub(first).min(source.outputs());
                let part = of(wanted.start)..of(wanted.end);
                if !part.is_empty() {
                    let at = (first + part.start - wanted.start) * columns;
                    source.read(part, &mut out[at..])?;
                }
                first += source.outputs();
            }
            Ok::<_, ModelError>(())
        })?;
        Ok(Self { matrix, bias })
    }

    /// Size of the weights in bytes.
    pub(crate) fn size_bytes(&self) -> usize {
        self.matrix.size_bytes()
    }

    /// Number of outputs.
    pub(crate) fn outputs(&self) -> usize {
        self.matrix.rows()
    }

    /// One row of the weights, `[in]`.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        self.matrix.row(row, out);
    }

    /// `out = x W^T + b`: `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, how: Arithmetic, x: &[f32], buffer: &mut InputBuffer, out: &mut [f32]) {
        let inputs = how.inputs(&self.matrix, x, buffer);
        multiply(how.isa, &self.matrix, inputs, 1, out, self.matrix.rows(), |column, [sums, _], out| {
            out.copy_from_slice(&sums[..out.len()]);
            self.add_bias(column, out);
        });
    }

    /// `out += factor * (x W^T + b)`.
    pub(crate) fn add(&self, how: Arithmetic, x: &[f32], buffer: &mut InputBuffer, factor: f32, out: &mut [f32]) {
        let inputs = how.inputs(&self.matrix, x, buffer);
        multiply(how.isa, &self.matrix, inputs, 1, out, self.matrix.rows(), |column, [sums, _], out| {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += factor * sum);
            if let Some(bias) = &self.bias {
                out.iter_mut().zip(&bias[column..]).for_each(|(out, bias)| *out += factor * bias);
            }
        });
    }

    fn add_bias(&self, column: usize, out: &mut [f32]) {
        if let Some(bias) = &self.bias {
            out.iter_mut().zip(&bias[column..]).for_each(|(out, bias)| *out += bias);
        }
    }
}

/// `activation(x G^T + g) * (x U^T + u)`, the first half of a gated MLP, in one pass: panels of gate and up alternate.
pub(crate) struct GatedLinear {
    matrix: Packed,
    outputs: usize,
    activation: Activation,
    /// Biases of gate and up.
    bias: Option<[Vec<f32>; 2]>,
}

impl GatedLinear {
    pub(crate) fn load(
        find: &Sources<'_>,
        format: WeightFormat,
        activation: Activation,
        layer: Option<usize>,
    ) -> Result<Self, ModelError> {
        let parameters = [Parameter::Gate, Parameter::Up];
        let sources = find.weights_of(&parameters, layer)?;
        let bias = find.biases(&parameters, &sources, layer)?.and_then(|biases| biases.try_into().ok());
        let (gate, up) = (&sources[0], &sources[1]);
        let (outputs, columns) = (gate.outputs(), gate.inputs());
        let matrix = Packed::pack(format, 2 * outputs.next_multiple_of(PANEL), columns, |panel, out| {
            let first = panel / 2 * PANEL;
            let source = if panel % 2 == 0 { gate } else { up };
            source.read(first..first + PANEL, out)
        })?;
        Ok(Self { matrix, outputs, activation, bias })
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.matrix.size_bytes()
    }

    /// `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, how: Arithmetic, x: &[f32], buffer: &mut InputBuffer, out: &mut [f32]) {
        let (inputs, activation) = (how.inputs(&self.matrix, x, buffer), self.activation);
        multiply(how.isa, &self.matrix, inputs, 2, out, self.outputs, |column, [gate, up], out| match &self.bias {
            None => how.isa.run(GateMul { activation, gate, up, out }),
            Some(bias) => {
                let mut biased = [[0.0; PANEL]; 2];
                for ((biased, sums), bias) in biased.iter_mut().zip([gate, up]).zip(bias) {
                    let bias = bias[column..].iter().chain(std::iter::repeat(&0.0));
                    biased.iter_mut().zip(sums.iter().zip(bias)).for_each(|(to, (sum, bias))| *to = sum + bias);
                }
                how.isa.run(GateMul { activation, gate: &biased[0], up: &biased[1], out });
            }
        });
    }
}
