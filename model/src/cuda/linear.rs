//! A linear layer in device memory.

use cudarc::driver::CudaFunction;
use rayon::prelude::*;

use super::{
    blas::{self, Product},
    device::{Fault, Gpu},
    launch::{Dequantize, Embed, GEMV_OUTPUTS, GEMV_ROWS, Gemv, Matrix, blocks_across},
    memory::{Buffer, Pointer},
    pack::{Format, Half, padded},
};
use crate::{
    ModelError, Parameter,
    source::{Source, Sources},
};

/// Elements that are read, packed and copied at once while loading. Bounds the temporary copies.
const PIECE_ELEMENTS: usize = 1 << 24;

/// The kernels for one format of weights.
pub(super) struct FormatKernels {
    half: CudaFunction,
    float: CudaFunction,
    add: CudaFunction,
    embed: CudaFunction,
    /// `None` for 16-bit formats, which cuBLASLt multiplies as they are.
    dequantize: Option<CudaFunction>,
}

impl FormatKernels {
    pub(super) fn new(gpu: &Gpu, half: Half, format: Format) -> Result<Self, Fault> {
        let (half, name) = (half.name(), format.name());
        let of = |kernel: &str| gpu.launcher.function(&format!("{kernel}_{half}_{name}"));
        let dequantize = match format {
            Format::Plain(_) => None,
            _ => Some(of("dequantize")?),
        };
        Ok(Self { half: of("gemv")?, float: of("gemv_f32")?, add: of("gemv_add")?, embed: of("embed")?, dequantize })
    }
}

/// `y = x W^T + b`. Outputs and inputs are padded with zeros.
pub(super) struct Linear {
    format: Format,
    weights: Buffer,
    scales: Option<Buffer>,
    /// `[outputs]`, in the type of the results.
    bias: Option<Buffer>,
    /// With padding.
    outputs: usize,
    /// With padding.
    inputs: usize,
}

/// Where a layer's rows come from: parameters below each other.
pub(super) struct Rows<'a> {
    /// The model's parameters.
    pub(super) find: &'a Sources<'a>,
    /// Which ones.
    pub(super) parameters: &'a [Parameter],
    /// Layer; `None` outside of layers.
    pub(super) layer: Option<usize>,
    /// Whether each parameter is padded, rather than all of them together.
    pub(super) pad_each: bool,
}

impl Linear {
    /// Reads, packs and copies a layer's weights, piece by piece. `result`: what its products return, which decides the
    /// type of the bias.
    pub(super) fn load(
        gpu: &Gpu,
        index: usize,
        half: Half,
        format: Format,
        rows: &Rows<'_>,
        result: blas::Result,
    ) -> Result<Self, ModelError> {
        let fault = |fault: Fault| fault.while_loading(index);
        let sources = rows.find.weights_of(rows.parameters, rows.layer)?;
        let width = sources[0].inputs();
        let (inputs, stream) = (padded(width), gpu.launcher.stream());
        let height = |outputs: usize| if rows.pad_each { padded(outputs) } else { outputs };
        let outputs = padded(sources.iter().map(|source| height(source.outputs())).sum());
        let (row_bytes, row_scales) = (format.row_bytes(inputs), format.row_scales(inputs));
        let zeroed = |bytes| Buffer::zeroed(stream, bytes).map_err(fault);
        let weights = zeroed(outputs * row_bytes)?;
        let scales = (row_scales > 0).then(|| zeroed(outputs * row_scales * 2)).transpose()?;
        let mut first = 0;
        for source in &sources {
            let piece = (PIECE_ELEMENTS / width).max(1);
            for start in (0..source.outputs()).step_by(piece) {
                let end = source.outputs().min(start + piece);
                let (bytes, found) = format.pack(&read(source, start, end, width)?, width);
                let at = first + start;
                weights.upload(stream, at * row_bytes, &bytes).map_err(|e| fault(e.into()))?;
                if let Some(scales) = &scales {
                    scales.upload(stream, at * row_scales * 2, &found).map_err(|e| fault(e.into()))?;
                }
            }
            first += height(source.outputs());
        }
        let bias = rows.find.biases(rows.parameters, &sources, rows.layer)?.map(|biases| {
            let mut all: Vec<f32> = Vec::with_capacity(outputs);
            for mut bias in biases {
                bias.resize(height(bias.len()), 0.0);
                all.append(&mut bias);
            }
            all.resize(outputs, 0.0);
            match result {
                blas::Result::Half => Buffer::of(stream, &all.iter().map(|b| half.bits(*b)).collect::<Vec<_>>()),
                blas::Result::Float | blas::Result::Added => Buffer::of(stream, &all),
            }
        });
        let bias = bias.transpose().map_err(fault)?;
        Ok(Self { format, weights, scales, bias, outputs, inputs })
    }

    /// Outputs, with padding.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Size of weights and scales in bytes.
    pub(super) fn size_bytes(&self) -> usize {
        self.weights.bytes() + self.scales.as_ref().map_or(0, Buffer::bytes)
    }

    /// Bytes that [`Self::multiply`] needs at `scratch` for more rows than [`GEMV_ROWS`].
    pub(super) fn scratch_bytes(&self) -> usize {
        match self.format {
            Format::Plain(_) => 0,
            _ => self.outputs * self.inputs * 2,
        }
    }

    fn matrix(&self) -> Matrix {
        Matrix {
            bytes: self.weights.pointer(),
            scales: self.scales.as_ref().map_or(Pointer::NULL, Buffer::pointer),
            row_bytes: self.format.row_bytes(self.inputs) as i32,
            inputs: self.inputs as i32,
        }
    }

    /// Queues the product of `rows` rows at `x` into `out`. Both have room for rows up to the next multiple of
    /// [`blas::ROWS`].
    pub(super) fn multiply(
        &self,
        gpu: &Gpu,
        kernels: &FormatKernels,
        [x, out, scratch]: [Pointer; 3],
        rows: usize,
        result: blas::Result,
    ) -> Result<(), Fault> {
        let bias = self.bias.as_ref().map(Buffer::pointer);
        if rows <= GEMV_ROWS {
            let kernel = match result {
                blas::Result::Half => &kernels.half,
                blas::Result::Float => &kernels.float,
                blas::Result::Added => &kernels.add,
            };
            let params = Gemv {
                weights: self.matrix(),
                x,
                bias: bias.unwrap_or(Pointer::NULL),
                out,
                rows: rows as i32,
                stride: self.outputs as i32,
            };
            return Ok(gpu.launcher.launch(kernel, [self.outputs / GEMV_OUTPUTS, 1, 1], &params)?);
        }
        let weights = match &kernels.dequantize {
            None => self.weights.pointer(),
            Some(kernel) => {
                let params = Dequantize { weights: self.matrix(), out: scratch };
                // Grids have at most 65535 blocks in y, and a head has more outputs.
                gpu.launcher.launch(kernel, [self.outputs, blocks_across(self.inputs), 1], &params)?;
                scratch
            }
        };
        let product = Product { weights, x, bias, out, rows, outputs: self.outputs, inputs: self.inputs, result };
        gpu.blas.multiply(gpu.launcher.stream(), &product)
    }

    /// Queues the look-up of `rows` tokens at `tokens`, as f32 at `out`, times `factor`.
    pub(super) fn embed(
        &self,
        gpu: &Gpu,
        kernels: &FormatKernels,
        [tokens, out]: [Pointer; 2],
        rows: usize,
        factor: f32,
    ) -> Result<(), Fault> {
        let params = Embed { table: self.matrix(), tokens, out, factor };
        Ok(gpu.launcher.launch(&kernels.embed, [rows, blocks_across(self.inputs), 1], &params)?)
    }
}

/// Rows `start..end` of a parameter.
fn read(source: &Source<'_>, start: usize, end: usize, width: usize) -> Result<Vec<f32>, ModelError> {
    let mut values = vec![0.0; (end - start) * width];
    // Many rows at a time: reading converts them one by one.
    let rows = (end - start).div_ceil(rayon::current_num_threads()).max(1);
    values.par_chunks_mut(rows * width).enumerate().try_for_each(|(i, out)| {
        let first = start + i * rows;
        source.read(first..first + out.len() / width, out)
    })?;
    Ok(values)
}
