//! The demo pair: its task, its data, the stages that make it, and the measurement of what they gain.

pub mod data;
pub mod files;
pub mod quality;
pub mod recipe;
mod report;
pub mod task;
