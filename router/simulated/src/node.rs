//! The `Node` service, which nodes of both roles have.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _};
use overfill_proto::v1;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use super::State;

pub(super) type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct Service(pub(super) Arc<State>);

#[tonic::async_trait]
impl v1::node_server::Node for Service {
    type WatchLoadStream = Events<v1::NodeLoad>;
    type DrainStream = Events<v1::NodeLoad>;

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let (info, load) = (Some(self.0.info.clone()), Some(*self.0.load.borrow()));
        Ok(Response::new(v1::DescribeResponse { info, load }))
    }

    async fn watch_load(&self, _: Request<v1::WatchLoadRequest>) -> Result<Response<Self::WatchLoadStream>, Status> {
        let stop = self.0.stop.clone().cancelled_owned();
        Ok(Response::new(Box::pin(WatchStream::new(self.0.load.subscribe()).map(Ok).take_until(stop))))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        Err(Status::unimplemented("a simulated node does not drain"))
    }
}
