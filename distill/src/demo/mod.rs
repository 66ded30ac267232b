//! The demo pair: its task, its data, its training recipe, and the measurement of quality by fine-tuning budget.

pub mod data;
pub mod files;
pub mod quality;
pub mod recipe;
mod report;
pub mod task;
