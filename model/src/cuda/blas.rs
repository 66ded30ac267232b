//! Products with many rows, by cuBLASLt.
#![allow(unsafe_code)]

use std::{cell::RefCell, collections::HashMap, ffi::c_void, sync::Arc};

use cudarc::{
    cublaslt::{result, sys},
    driver::CudaStream,
};

use super::{
    device::Fault,
    memory::{Buffer, Pointer},
    pack::Half,
};

/// Memory that cuBLASLt may use, as NVIDIA recommends for Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// Rows are rounded up to a multiple of this, so that few shapes occur. The rows between are computed and never read.
pub(super) const ROWS: usize = 16;

/// cublasOperation_t's CUBLAS_OP_T. cudarc declares it only for cuBLAS.
const TRANSPOSED: i32 = 1;

/// Element type of a product, and whether it is added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Result {
    /// 16 bits.
    Half,
    /// f32.
    Float,
    /// f32, added.
    Added,
}

/// A product: `out[rows, outputs] = x[rows, inputs] weights[outputs, inputs]^T + bias`.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// 16-bit elements, `[outputs, inputs]`.
    pub(super) weights: Pointer,
    /// 16-bit elements, `[rows rounded up to ROWS, inputs]`.
    pub(super) x: Pointer,
    /// `[outputs]`, of the result's type.
    pub(super) bias: Option<Pointer>,
    /// `[rows rounded up to ROWS, outputs]`.
    pub(super) out: Pointer,
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) result: Result,
}

/// A handle of cuBLASLt, with the algorithms chosen so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    half: Half,
    workspace: Buffer,
    plans: RefCell<HashMap<Shape, Plan>>,
}

// SAFETY: a handle may be used from any thread; this one is used by one thread at a time.
unsafe impl Send for Blas {}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    outputs: usize,
    inputs: usize,
    result: Result,
    biased: bool,
}

/// Descriptions of a product and its operands, and the algorithm for it.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    /// Of weights, x and out, as cuBLASLt sees them: by columns.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Blas {
    pub(super) fn new(stream: &Arc<CudaStream>, half: Half) -> std::result::Result<Self, Fault> {
        // SAFETY: only asks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            return Err(Fault::Library("libcublasLt"));
        }
        let workspace = Buffer::zeroed(stream, WORKSPACE_BYTES)?;
        Ok(Self { handle: result::create_handle()?, half, workspace, plans: RefCell::default() })
    }

    /// Queues a product on `stream`.
    pub(super) fn multiply(&self, stream: &CudaStream, p: &Product) -> std::result::Result<(), Fault> {
        let rows = p.rows.next_multiple_of(ROWS);
        let biased = p.bias.is_some();
        let shape = Shape { rows, outputs: p.outputs, inputs: p.inputs, result: p.result, biased };
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => free.insert(self.plan(shape)?),
        };
        let (one, beta) = (1.0_f32, if p.result == Result::Added { 1.0_f32 } else { 0.0 });
        if let Some(bias) = p.bias {
            set(plan.product, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let [weights, x, out] = plan.layouts;
        // SAFETY: the plan was made for this shape, and the operands have it. `one` and `beta` are in host memory, and the
        // call reads them before it returns.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                p.weights.as_c(),
                weights,
                p.x.as_c(),
                x,
                p.out.as_c(),
                out,
                p.out.as_c(),
                out,
                &raw const plan.algorithm,
                self.workspace.pointer().as_c(),
                self.workspace.bytes(),
                stream.cu_stream().cast(),
            )?;
        }
        Ok(())
    }

    /// Describes a product and asks for an algorithm. cuBLASLt's matrices are stored by columns: a row-major matrix is
    /// its own transpose there. So `out^T [outputs, rows] = weights [inputs, outputs]^T x [inputs, rows]`.
    fn plan(&self, shape: Shape) -> std::result::Result<Plan, Fault> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let half = match self.half {
            Half::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Half::F16 => sys::cudaDataType_t::CUDA_R_16F,
        };
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        let element = if shape.result == Result::Half { half } else { f32 };
        let product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)?;
        set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if shape.biased {
            set(product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &element)?;
        }
        let (rows, outputs, inputs) = (shape.rows as u64, shape.outputs as u64, shape.inputs as u64);
        let layouts = [
            result::create_matrix_layout(half, inputs, outputs, inputs as i64)?,
            result::create_matrix_layout(half, inputs, rows, inputs as i64)?,
            result::create_matrix_layout(element, outputs, rows, outputs as i64)?,
        ];
        let preference = result::create_matmul_pref()?;
        let bytes = self.workspace.bytes();
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the descriptions are valid, and `preference` is destroyed once. The attribute's type is size_t.
        let found = unsafe {
            result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), size_of::<usize>())?;
            let [weights, x, out] = layouts;
            let found = result::get_matmul_algo_heuristic(self.handle, product, weights, x, out, out, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Plan { product, layouts, algorithm: found.algo })
    }
}

/// Sets an attribute to a value of the type that cuBLASLt's manual states.
fn set<T>(
    product: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), Fault> {
    // SAFETY: cuBLASLt copies `size_of::<T>()` bytes.
    unsafe {
        let value: *const c_void = (&raw const *value).cast();
        Ok(result::set_matmul_desc_attribute(product, attribute, value, size_of::<T>())?)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        for plan in self.plans.get_mut().values() {
            // SAFETY: created by `plan`, destroyed once.
            let destroyed = unsafe {
                plan.layouts
                    .iter()
                    .try_for_each(|layout| result::destroy_matrix_layout(*layout))
                    .and_then(|()| result::destroy_matmul_desc(plan.product))
            };
            if let Err(error) = destroyed {
                tracing::warn!(?error, "a description of a product could not be freed");
            }
        }
        // SAFETY: created by `new`, destroyed once.
        if let Err(error) = unsafe { result::destroy_handle(self.handle) } {
            tracing::warn!(?error, "the handle of cuBLASLt could not be freed");
        }
    }
}
