//! Tests of limits, order and eviction.

use super::*;

fn ask() -> Ask {
    let later = Instant::now() + Duration::from_secs(3600);
    Ask { priority: 0, prompt_tokens: 10, max_tokens: 10, run_by: later, end_by: later }
}

fn tenant(name: &str, weight: u32) -> Arc<Tenant> {
    let mut tenant = Tenant::named(name);
    tenant.weight = weight;
    Arc::new(tenant)
}

/// Runs all `places`, each with `tokens` tokens. Returns their names, concatenated in the order in which they ran.
async fn order(places: Vec<(&'static str, Place)>, tokens: usize) -> String {
    let log = Arc::new(Mutex::new(String::new()));
    let tasks: Vec<_> = places
        .into_iter()
        .map(|(name, place)| {
            let log = log.clone();
            tokio::spawn(async move {
                let mut running = place.run().await.unwrap();
                *log.lock() += name;
                (0..tokens).for_each(|_| running.token());
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    std::mem::take(&mut *log.lock())
}

#[tokio::test]
async fn bounds_hold_and_places_come_back() {
    let (admission, a) = (ModelAdmission::new(1, 1), tenant("a", 1));
    let mut places = admission.enter(&a, &[ask(), Ask { run_by: Instant::now(), ..ask() }]).unwrap();
    let full = admission.enter(&a, &[ask()]).err();
    assert!(matches!(full, Some(GenerateError::QueueFull { limit: 2, .. })), "{full:?}");
    let second = places.pop().unwrap();
    let first = places.pop().unwrap().run().await.unwrap();
    assert_eq!((admission.running(), admission.waiting()), (1, 1));
    assert!(matches!(second.run().await.err(), Some(GenerateError::NoRoom { .. })));
    assert_eq!((admission.running(), admission.waiting()), (1, 0));
    drop(first);
    assert_eq!((admission.running(), admission.waiting()), (0, 0));
    assert!(matches!(admission.enter(&a, &[ask(); 3]), Err(GenerateError::Invalid { .. })));
    // If an admitted place is dropped, the next one is admitted.
    let mut places = admission.enter(&a, &[ask(), ask()]).unwrap();
    places.remove(0);
    drop(places.remove(0).run().await.unwrap());
    assert_eq!((admission.running(), admission.waiting(), admission.queue.lock().accounts.len()), (0, 0, 0));
}

#[tokio::test]
async fn who_leaves_while_waiting_takes_no_turn() {
    let (admission, a) = (ModelAdmission::new(1, 2), tenant("a", 1));
    let mut places = admission.enter(&a, &[ask(), ask()]).unwrap();
    let second = places.pop().unwrap();
    let first = places.pop().unwrap().run().await.unwrap();
    let left = tokio::time::timeout(Duration::from_millis(1), second.run()).await;
    assert!(left.is_err(), "two run");
    assert_eq!((admission.running(), admission.waiting()), (1, 0));
    drop(first);
    assert_eq!((admission.running(), admission.waiting(), admission.queue.lock().accounts.len()), (0, 0, 0));
}

#[tokio::test]
async fn tenants_take_turns_by_weight_in_any_order_of_arrival() {
    let admission = ModelAdmission::new(1, 100);
    let (a, b) = (tenant("a", 1), tenant("b", 2));
    let gate = admission.enter(&a, &[ask()]).unwrap().remove(0).run().await.unwrap();
    let places = |tenant, n: usize| admission.enter(tenant, &vec![ask(); n]).unwrap().into_iter();
    let mut all: Vec<_> = places(&a, 8).map(|p| ("a", p)).collect();
    all.extend(places(&b, 8).map(|p| ("b", p)));
    tokio::task::yield_now().await;
    drop(gate);
    let order = order(all, 5).await;
    let early = order[..9].matches('b').count();
    assert!((5..=7).contains(&early), "{order}");
    assert_eq!(order.len(), 16);
}

#[tokio::test]
async fn priority_goes_first() {
    let (admission, a) = (ModelAdmission::new(1, 100), tenant("a", 1));
    let gate = admission.enter(&a, &[ask()]).unwrap().remove(0).run().await.unwrap();
    let place = |priority| admission.enter(&a, &[Ask { priority, ..ask() }]).unwrap().remove(0);
    let all = vec![("x", place(5)), ("y", place(0)), ("z", place(-5))];
    drop(gate);
    assert_eq!(order(all, 1).await, "zyx");
}

#[tokio::test]
async fn the_tenant_that_fills_the_queue_gives_way() {
    let (admission, a, b) = (ModelAdmission::new(1, 4), tenant("a", 1), tenant("b", 1));
    let mut of_a = admission.enter(&a, &[ask(); 5]).unwrap();
    assert!(admission.enter(&a, &[ask()]).is_err(), "a tenant evicts none of its own sequences");
    let of_b = admission.enter(&b, &[ask(); 2]).unwrap();
    assert!(admission.enter(&b, &[ask()]).is_err(), "a and b have equally many sequences");
    let evicted = of_a.pop().unwrap().run().await.err();
    assert!(matches!(evicted, Some(GenerateError::QueueFull { .. })), "{evicted:?}");
    let urgent = admission.enter(&a, &[Ask { priority: -1, ..ask() }]).unwrap();
    assert_eq!((admission.running(), admission.waiting()), (1, 4));
    drop((of_a, of_b, urgent));
    assert_eq!((admission.running(), admission.waiting(), admission.queue.lock().accounts.len()), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_would_be_late_is_refused_at_once() {
    let (admission, a) = (ModelAdmission::new(1, 100), tenant("a", 1));
    // Three sequences of ten seconds each, run one after the other, give the estimate.
    for place in admission.enter(&a, &[ask(), ask(), ask()]).unwrap() {
        let mut running = place.run().await.unwrap();
        tokio::time::sleep(Duration::from_secs(10)).await;
        (0..10).for_each(|_| running.token());
    }
    let within = |seconds| Ask { end_by: Instant::now() + Duration::from_secs(seconds), ..ask() };
    let running = admission.enter(&a, &[within(12)]).unwrap();
    let refused = admission.enter(&a, &[within(15)]).err();
    assert!(matches!(refused, Some(GenerateError::Overloaded { .. })), "{refused:?}");
    let waiting = admission.enter(&a, &[within(25)]).unwrap().remove(0);
    let patient = admission.enter(&a, &[ask()]).unwrap().remove(0);
    // The first one takes longer than estimated. The second can't meet its deadline any more, the third can.
    tokio::time::sleep(Duration::from_secs(20)).await;
    drop(running);
    let late = waiting.run().await.err();
    assert!(matches!(late, Some(GenerateError::Late { .. })), "{late:?}");
    drop(patient.run().await.unwrap());
    // If no other sequence waits, the estimate is ignored: the nodes may have become faster.
    let alone = admission.enter(&a, &[within(5)]).unwrap().remove(0);
    assert!(alone.run().await.is_ok());
}

#[tokio::test]
async fn no_more_run_than_the_nodes_have_places_for() {
    let (admission, a) = (ModelAdmission::new(8, 8), tenant("a", 1));
    admission.set_capacity(2);
    let places = admission.enter(&a, &[ask(); 4]).unwrap();
    assert_eq!((admission.running(), admission.waiting()), (2, 2));
    admission.set_capacity(3);
    assert_eq!((admission.running(), admission.waiting()), (3, 1));
    drop(places);
    assert_eq!((admission.running(), admission.waiting()), (0, 0));
}

#[tokio::test]
async fn models_do_not_wait_for_each_other() {
    let (admission, a) = (Admission::new(8, 2), tenant("a", 1));
    admission.set_capacity("busy", Some(1));
    admission.set_capacity("gone", None);
    let busy = admission.enter("busy", &a, &[ask(); 3]).unwrap();
    assert!(matches!(admission.enter("busy", &a, &[ask()]), Err(GenerateError::QueueFull { limit: 3, .. })));
    assert_eq!((admission.running(), admission.waiting()), (1, 2));
    let gone = admission.enter("gone", &a, &[ask(); 10]).unwrap();
    let other = admission.enter("other", &a, &[ask()]).unwrap();
    assert_eq!((admission.running(), admission.waiting()), (10, 4));
    admission.set_capacity("busy", Some(2));
    assert_eq!((admission.running(), admission.waiting()), (11, 3));
    assert!(admission.check_count(10).is_ok() && admission.check_count(11).is_err());
    drop((busy, gone, other));
    assert_eq!((admission.running(), admission.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_idle_hour_does_not_close_the_queue() {
    let (admission, a) = (ModelAdmission::new(1, 8), tenant("a", 1));
    let ask = || {
        let soon = Instant::now() + Duration::from_secs(60);
        Ask { run_by: soon, ..ask() }
    };
    let run = async |place: Place| {
        let mut running = place.run().await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        running.token();
    };
    for _ in 0..3 {
        let places = admission.enter(&a, &[ask(), ask(), ask()]).unwrap();
        for place in places {
            run(place).await;
        }
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
    let interval = admission.queue.lock().learnt.interval.unwrap();
    assert!((interval - 1.0).abs() < 1e-6, "{interval}");
    // Even with an estimate that is far too high, one sequence waits, and corrects it.
    admission.queue.lock().learnt.interval = Some(1e6);
    let running = admission.enter(&a, &[ask()]).unwrap();
    let waiting = admission.enter(&a, &[ask()]).unwrap();
    assert!(matches!(admission.enter(&a, &[ask()]).err(), Some(GenerateError::Overloaded { .. })));
    drop((running, waiting));
}
