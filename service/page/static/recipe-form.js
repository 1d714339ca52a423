// A form made from the recipe's JSON schema. A control's id is "recipe." and the field's path in the recipe, which
// is also how the service names a field that is wrong.

import { h, words } from "./dom.js";

// How the fields are laid out; a field that is in no group comes last, so that a new one is never missing.
const GROUPS = [
  { title: "Precision", fields: ["weight_bits", "activation_bits", "ranges", "per_channel", "calibration", "symmetric"], open: true },
  { title: "Training", fields: ["loss", "optimizer", "frozen", "training_device"] },
  { title: "Batch norm and schedule", fields: ["batch_norm", "fold_statistics", "quant_delay", "freeze_bn_delay", "step_counter"] },
  { title: "Placement", fields: ["target", "scope", "overrides"] },
];
const OTHER = "More";

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** The form, for `recipe` as far as it can show it; `onChange(recipe)` hears of each change. */
export function createRecipeForm(schema, onChange) {
  const definitions = schema.$defs ?? {};
  let recipe = {};
  const fields = Object.entries(schema.properties).map(([name, property]) => ({
    name,
    initial: property.default,
    control: createControl(definitions, property, name, `recipe.${name}`, () => changed(name)),
  }));
  const byName = new Map(fields.map((field) => [field.name, field]));

  function changed(name) {
    const { control, initial } = byName.get(name);
    const value = control.get();
    recipe = { ...recipe };
    if (same(value, initial)) delete recipe[name];
    else recipe[name] = value;
    mark();
    onChange(recipe);
  }

  const sections = groupsOf(fields).map(({ title, members, open }) => {
    const changes = h("span", { class: "changes" });
    const element = h("details", { class: "group", open },
      h("summary", {}, title, changes),
      h("div", { class: "fields" }, members.map(({ control }) => control.element)));
    return { element, changes, members };
  });

  function mark() {
    for (const { changes, members } of sections) {
      const names = members.filter(({ name }) => name in recipe);
      changes.textContent = names.length ? `${names.length} changed` : "";
      for (const { name, control } of members) control.element.classList.toggle("changed", name in recipe);
    }
  }

  return {
    element: h("div", { class: "recipe-form" }, sections.map(({ element }) => element)),
    defaults: Object.fromEntries(fields.map(({ name, initial }) => [name, initial])),
    write(settings) {
      recipe = settings;
      for (const { name, control, initial } of fields) control.set(name in settings ? settings[name] : initial);
      mark();
    },
  };
}

function groupsOf(fields) {
  const left = new Map(fields.map((field) => [field.name, field]));
  const groups = GROUPS.map(({ title, fields: names, open }) => {
    const members = names.filter((name) => left.has(name)).map((name) => left.get(name));
    for (const { name } of members) left.delete(name);
    return { title, members, open: Boolean(open) };
  });
  groups.push({ title: OTHER, members: [...left.values()], open: false });
  return groups.filter(({ members }) => members.length);
}

/** Mark the control of a field that the service found wrong; the control, or null when there is none. */
export function markField(path, detail) {
  // The nearest control: of "overrides.0" that is its first one, of "frozen.0" the list.
  let control = null;
  for (let parts = path.split("."); parts.length && !control; parts = parts.slice(0, -1)) {
    const found = document.getElementById(`recipe.${parts.join(".")}`);
    control = found?.matches("fieldset, div") ? found.querySelector("input, select, textarea, button") : found;
  }
  if (!control) return null;
  control.closest("details")?.setAttribute("open", "");
  control.setAttribute("aria-invalid", "true");
  const error = document.getElementById(`${control.id}-error`);
  if (error) error.textContent = detail;
  control.addEventListener("input", () => clearMark(control), { once: true });
  return control;
}

function clearMark(control) {
  control.removeAttribute("aria-invalid");
  const error = document.getElementById(`${control.id}-error`);
  if (error) error.textContent = "";
}

export function clearMarks(form) {
  for (const control of form.querySelectorAll("[aria-invalid]")) clearMark(control);
}

/** A schema without references: the description and default of the field, the type of what it refers to. */
function resolve(definitions, schema) {
  const { $ref, anyOf, ...own } = schema;
  if ($ref) return { ...definitions[$ref.split("/").pop()], ...own };
  if (!anyOf) return own;
  const variants = anyOf.filter(({ type }) => type !== "null").map((variant) => resolve(definitions, variant));
  const nullable = variants.length < anyOf.length;
  return variants.length === 1 ? { ...variants[0], ...own, nullable } : { ...own, variants, nullable };
}

// What a field looks like: the first kind that fits its schema.
const KINDS = [
  [(schema) => schema.variants, createVariants],
  [(schema) => schema.enum, createSelect],
  [(schema) => schema.type === "boolean" && schema.nullable, createNullableBoolean],
  [(schema) => schema.type === "boolean", createCheckbox],
  [(schema) => schema.type === "integer" || schema.type === "number", createNumber],
  [(schema) => schema.type === "object", createObject],
  [(schema) => schema.type === "array" && schema.items.$ref, createList],
  [(schema) => schema.type === "array", createLines],
  [() => true, createText],
];

function createControl(definitions, schema, name, id, onChange, required = false) {
  const resolved = resolve(definitions, schema);
  const [, create] = KINDS.find(([fits]) => fits(resolved));
  return create({ definitions, schema: resolved, name, id, onChange, required });
}

// The label, the control itself, what it means, and what is wrong with it.
function field({ schema, name, id }, control, { wide = false } = {}) {
  control.id = id;
  const help = helpOf(schema);
  control.setAttribute("aria-describedby", `${help ? `${id}-help ` : ""}${id}-error`);
  const label = h("label", { for: id }, words(name));
  const isCheckbox = control.type === "checkbox";
  return h("div", { class: `field${wide ? " wide" : ""}${isCheckbox ? " check" : ""}` },
    isCheckbox ? [control, label] : [label, control],
    help && h("p", { class: "help", id: `${id}-help` }, help),
    h("p", { class: "field-error", id: `${id}-error` }));
}

function helpOf(schema) {
  const parts = [];
  if (schema.description) parts.push(schema.description);
  const low = schema.minimum ?? schema.exclusiveMinimum;
  if (low !== undefined && schema.maximum !== undefined && schema.maximum < 1e6) {
    parts.push(`${schema.exclusiveMinimum === undefined ? low : `above ${low}`} to ${schema.maximum}`);
  }
  if (schema.default !== undefined && schema.default !== null && !schema.enum && typeof schema.default !== "object") {
    parts.push(`default ${schema.default}`);
  }
  return parts.join("; ");
}

function createSelect(context) {
  const { schema, onChange } = context;
  const select = h("select", { onchange: onChange },
    schema.nullable && h("option", { value: "" }, "not set"),
    schema.enum.map((value) => h("option", { value }, value === schema.default ? `${value} (default)` : value)));
  return {
    element: field(context, select),
    get: () => select.value || null,
    set: (value) => (select.value = value ?? ""),
  };
}

function createNullableBoolean(context) {
  const select = h("select", { onchange: context.onChange }, ["not set", "true", "false"].map((text) => h("option", { value: text }, text)));
  return {
    element: field(context, select),
    get: () => (select.value === "not set" ? null : select.value === "true"),
    set: (value) => (select.value = value === null || value === undefined ? "not set" : String(value)),
  };
}

function createCheckbox(context) {
  const input = h("input", { type: "checkbox", onchange: context.onChange });
  return { element: field(context, input), get: () => input.checked, set: (value) => (input.checked = value === true) };
}

function createNumber(context) {
  const { schema, onChange } = context;
  const input = h("input", {
    type: "number",
    inputmode: schema.type === "integer" ? "numeric" : "decimal",
    min: schema.minimum ?? schema.exclusiveMinimum,
    max: schema.maximum,
    step: schema.type === "integer" ? 1 : "any",
    placeholder: schema.nullable ? "not set" : String(schema.default ?? ""),
    oninput: onChange,
  });
  return {
    element: field(context, input),
    // Empty is the default; text that is no number is kept out by the browser, which then gives an empty value.
    get: () => (input.value === "" ? (schema.default ?? null) : Number(input.value)),
    set: (value) => (input.value = value ?? ""),
  };
}

function createText(context) {
  const { schema, onChange, required } = context;
  const input = h("input", { type: "text", spellcheck: "false", autocomplete: "off", required, placeholder: schema.nullable ? "not set" : null, oninput: onChange });
  return {
    element: field(context, input),
    get: () => input.value || (schema.nullable ? null : ""),
    set: (value) => (input.value = value ?? ""),
  };
}

function createLines(context) {
  const area = h("textarea", { rows: "2", spellcheck: "false", placeholder: "one on each line", oninput: context.onChange });
  return {
    element: field(context, area),
    get: () => area.value.split("\n").map((line) => line.trim()).filter(Boolean),
    set: (value) => (area.value = Array.isArray(value) ? value.join("\n") : ""),
  };
}

/** The fields of an object, of which only those are read that differ from their defaults or are required. */
function createProperties({ definitions, schema, id, onChange }) {
  const required = new Set(schema.required);
  const members = Object.entries(schema.properties).map(([name, property]) => ({
    name,
    initial: property.default ?? null,
    control: createControl(definitions, property, name, `${id}.${name}`, onChange, required.has(name)),
  }));
  return {
    elements: members.map(({ control }) => control.element),
    get: () =>
      Object.fromEntries(
        members
          .map(({ name, control, initial }) => [name, control.get(), initial])
          .filter(([name, value, initial]) => required.has(name) || !same(value, initial))
          .map(([name, value]) => [name, value])),
    set: (value) => {
      for (const { name, control, initial } of members) control.set(value?.[name] ?? initial);
    },
  };
}

function createObject(context) {
  const { schema, name, id } = context;
  const properties = createProperties(context);
  return {
    element: h("fieldset", { class: "field nested", id }, h("legend", {}, words(name)), h("div", { class: "fields" }, properties.elements)),
    // As the default is written: an object that says nothing is the default.
    get: () => {
      const value = properties.get();
      return Object.keys(value).length ? value : schema.default;
    },
    set: properties.set,
  };
}

/** A value out of a list, or an object: the loss is a built-in one, or an output of the model. */
function createVariants(context) {
  const { schema, onChange } = context;
  const list = schema.variants.find((variant) => variant.enum);
  const object = schema.variants.find((variant) => variant.type === "object");
  const select = h("select", {},
    list.enum.map((value) => h("option", { value }, value === schema.default ? `${value} (default)` : value)),
    h("option", { value: "object" }, "a model output …"));
  const properties = createProperties({ ...context, schema: object });
  const nested = h("div", { class: "fields inner", hidden: true }, properties.elements);
  function show() {
    nested.hidden = select.value !== "object";
    // A hidden control must not keep the form from being sent.
    for (const control of nested.querySelectorAll("input, select")) control.disabled = nested.hidden;
  }
  select.addEventListener("change", () => {
    show();
    onChange();
  });
  const element = field(context, select);
  element.append(nested);
  return {
    element,
    get: () => (select.value === "object" ? properties.get() : select.value),
    set: (value) => {
      const isObject = value !== null && typeof value === "object";
      select.value = isObject ? "object" : value;
      properties.set(isObject ? value : {});
      show();
    },
  };
}

/** Objects, any number of them. */
function createList(context) {
  const { definitions, schema, name, id, onChange } = context;
  const item = resolve(definitions, schema.items);
  const title = item.title;
  let items = [];
  const list = h("div", { class: "items" });
  const add = h("button", { type: "button", class: "quiet" }, `Add ${title.toLowerCase()}`);
  add.id = `${id}.add`;
  add.addEventListener("click", () => {
    set([...get(), {}]);
    onChange();
    list.lastElementChild.querySelector("input").focus();
  });

  const get = () => items.map((properties) => properties.get());

  function set(values) {
    items = (Array.isArray(values) ? values : []).map((value, index) => {
      const properties = createProperties({ definitions, schema: item, id: `${id}.${index}`, onChange });
      properties.set(value);
      return properties;
    });
    list.replaceChildren(...items.map((properties, index) =>
      h("fieldset", { class: "item", id: `${id}.${index}` },
        h("legend", {}, `${title} ${index + 1}`),
        h("div", { class: "fields" }, properties.elements),
        h("button", { type: "button", class: "quiet", "aria-label": `Remove ${title.toLowerCase()} ${index + 1}`, onclick: () => remove(index) }, "Remove"))));
  }

  function remove(index) {
    set(get().filter((_, other) => other !== index));
    onChange();
    add.focus();
  }

  const element = h("div", { class: "field wide", id, role: "group", "aria-label": words(name) },
    h("p", { class: "label" }, words(name)), h("p", { class: "help" }, schema.description), list, add);
  return { element, get, set };
}
