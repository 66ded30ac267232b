// Who made a token: a stage and a model. Each gets a class, and so a colour, for as long as the page is open.

/** style.css has this many colours per stage. */
const COLOURS = 4;

const makers = new Map();
const perStage = new Map();

/** The class of those who made a token. The same model has the same colour in all answers. */
export function makerOf({ stage, model }) {
  const name = `${stage}\n${model}`;
  let maker = makers.get(name);
  if (!maker) {
    const number = perStage.get(stage) ?? 0;
    perStage.set(stage, number + 1);
    maker = { stage, model, css: `made made-${stage === 'prefill' ? 'prefill' : 'decode'}-${number % COLOURS}` };
    makers.set(name, maker);
  }
  return maker;
}

export const UNKNOWN = { stage: '', model: '', css: 'made' };
